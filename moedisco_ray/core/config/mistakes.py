"""Turns pydantic's validation errors into one line: field, value, remedy."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from moedisco_ray.core.config.inits import LocalInit
from moedisco_ray.core.config.run import RunConfig
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import ConfigError

_INITS = tuple(init.__name__ for init in LocalInit.__subclasses__())


def first_mistake(mistakes: Sequence[Mapping[str, Any]]) -> ConfigError:
    """The one mistake to show to a user, as field, value and remedy.

    Args:
        mistakes: `ValidationError.errors()`, at least one.
    """
    # A union reports the mistakes of every member. The user most likely meant the member with the fewest
    # mistakes, then the one with the longest path, then one that breaks a rule of ours.
    section = Counter(_section(mistake) for mistake in mistakes)
    fewest = min((count for name, count in section.items() if name is not None), default=0)
    meant = [mistake for mistake in mistakes if _section(mistake) is None or section[_section(mistake)] == fewest]
    unknown = [m for m in meant if m["type"] == "extra_forbidden"]
    first = unknown[0] if unknown else max(meant, key=lambda m: (len(m["loc"]), m["type"] == "value_error"))
    known_union_tags = {"Architecture", "int", "constrained-int", "literal['random']", "literal['auto']"}
    parts = [
        str(part) for part in first["loc"]
        if str(part) not in known_union_tags and not str(part).startswith("literal[") and _init_in(part) is None]
    field = ".".join(parts)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(parts[-1], _known_keys(parts[:-1]), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "remove it; `moedisco schema` lists every setting"
        return ConfigError(field, None, f"no such setting; {hint}")
    if first["type"] == "missing":
        return ConfigError(field, None, "is missing; `moedisco init` writes a configuration with every setting")
    message = plain_words(first)
    if not field:  # a rule across sections: its message begins with the field
        field, _, message = message.partition(" ")
        return ConfigError(field, None, message)
    if isinstance(first["input"], (dict, BaseModel)):
        return ConfigError(field, None, message)
    return ConfigError(field, first["input"], message)


def _section(mistake: Mapping[str, Any]) -> str | None:
    return next((name for name in map(_init_in, mistake["loc"]) if name is not None), None)


def _init_in(part: object) -> str | None:
    # pydantic tags a section by its name or by `function-after[check(), Name]`.
    return next((name for name in _INITS if name in str(part)), None)


def _known_keys(path: list[str]) -> list[str]:
    schema: dict[str, Any] = RunConfig.model_json_schema()
    nodes: list[dict[str, Any]] = [schema]
    for part in path:
        found = [node.get("items", {}) if part.isdigit() else node.get("properties", {}).get(part, {}) for node in nodes]
        options = [option for node in found for option in (node, *node.get("anyOf", []))]
        nodes = [schema["$defs"][option["$ref"].rsplit("/", 1)[-1]] for option in options if "$ref" in option] or found
    return [key for node in nodes for key in node.get("properties", {})]
