"""Changing single settings of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue

from moedisco_ray.core.errors import ConfigError


def changed(raw: dict[str, Any], path: str, value: JsonValue) -> dict[str, Any]:
    """A copy of a configuration with one setting changed; what is not touched is shared with the original.

    Args:
        raw: The configuration as plain data.
        path: Dotted; an entry of a list by its number: `corpus.sources.0.weight`.
        value: The setting's new value.

    Raises:
        ConfigError: A part of the path names no entry of a list, or goes into what is no section.
    """
    document: dict[str, Any] = _changed(raw, path.split("."), value, path)
    return document


def _changed(node: Any, parts: Sequence[str], value: JsonValue, path: str) -> Any:
    if not parts:
        return value
    first, *rest = parts
    if isinstance(node, list):
        if not (first.isascii() and first.isdigit() and len(first) < 6 and int(first) < len(node)):
            raise ConfigError(path, first, f"is no entry of the list; it has {len(node)}, from 0")
        place = int(first)
        return [*node[:place], _changed(node[place], rest, value, path), *node[place + 1:]]
    if node is not None and not isinstance(node, dict):
        raise ConfigError(path, None, f"there is no section above {first!r}")
    section = node or {}
    return {**section, first: _changed(section.get(first), rest, value, path)}
