"""The YAML that users write: 4e5 and 1e-3 are numbers, as in YAML 1.2 and JSON, and a mapping has each key once."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from moedisco_ray.core.config.extent import MOST_LEVELS


class YamlError(yaml.YAMLError):
    """A text that is not YAML, has a key twice, is nested too deeply, or holds more than plain data.

    Its message can follow the name of a file.
    """


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads `1e-4` and `1e5` as numbers, and refuses a key that a mapping has twice.

    YAML 1.1 asks for a point and a signed exponent. PyYAML keeps the last of two equal keys, so that the second of two
    sections `tokens` would silently replace the first. It also refuses a text with more than `MOST_LEVELS` levels.
    """

    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._level += 1
        if self._level > MOST_LEVELS:
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise YamlError(
                f"has more than {MOST_LEVELS} lists and mappings inside each other at line {line}; write fewer levels"
            )
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            merges = key_node.tag == "tag:yaml.org,2002:merge"  # `<<`, which stands for the keys of other mappings
            key = "<<" if merges else self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                continue  # refused by PyYAML, in words of its own
            if key in lines:
                raise YamlError(_twice(key, lines[key], line))
            lines[key] = line
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Plain data from one YAML document; None if it is empty.

    Raises:
        YamlError: The text is not one YAML document of plain data, is nested too deeply, or a mapping has a key twice.
    """
    documents = parse_documents(text)
    if len(documents) > 1:
        raise YamlError(f"holds {len(documents)} YAML documents; keep one")
    return documents[0] if documents else None


def parse_documents(text: str) -> list[Any]:
    """Plain data from all YAML documents of a text.

    Raises:
        YamlError: The text is not YAML, is nested too deeply, holds more than plain data, or a mapping has a key twice.
    """
    try:
        return list(yaml.load_all(text, _Loader))
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        raise YamlError(f"is not YAML{where}: {getattr(error, 'problem', None) or error}") from error


def _twice(key: Hashable, first: int, second: int) -> str:
    where = f"twice in line {first}" if first == second else f"in line {first} and again in line {second}"
    return f"has the key {str(key)!r} {where}; keep one of them"
