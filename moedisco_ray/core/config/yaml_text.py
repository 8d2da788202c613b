"""YAML in which 4e5 and 1e-3 are numbers, as in YAML 1.2 and JSON."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads `1e-4` and `1e5` as numbers. YAML 1.1 asks for a point and a signed exponent."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789"))


def parse_yaml(text: str) -> Any:
    """Plain data from one YAML document.

    Raises:
        yaml.YAMLError: The text is not YAML, or holds something other than plain data.
    """
    return yaml.load(text, _Loader)  # noqa: S506 - a safe loader
