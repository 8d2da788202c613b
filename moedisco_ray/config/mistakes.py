"""From what pydantic found to one line in plain words: field, value, remedy."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from moedisco_ray.config.model import LocalInit
from moedisco_ray.config.run import RunConfig
from moedisco_ray.errors import ConfigError

_INITS = tuple(init.__name__ for init in LocalInit.__subclasses__())

_WORDS: Mapping[str, str] = {
    "missing": "is missing",
    "none_required": "must be null",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "is too large a number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "multiple_of": "must be a multiple of {multiple_of}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_type": "must be text; put it in quotes",
    "string_unicode": "must be Unicode text",
    "string_sub_type": "must be text; put it in quotes",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "path_type": "must be a path",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "set_type": "must be a list",
    "iterable_type": "must be a list",
    "too_short": "must have at least {min_length} entries, and has {actual_length}",
    "too_long": "must have at most {max_length} entries",
    "dict_type": "must be a section with settings of its own",
    "mapping_type": "must be a section with settings of its own",
    "model_type": "must be a section with settings of its own",
    "model_attributes_type": "must be a section with settings of its own",
    "dataclass_type": "must be a section with settings of its own",
    "invalid_key": "must have text as its keys",
    "union_tag_invalid": "must be one of {expected_tags}",
    "union_tag_not_found": "must name its kind in {discriminator}",
    "json_invalid": "is not JSON: {error}",
    "json_type": "must be JSON text",
    "url_parsing": "must be a URL",
    "url_type": "must be a URL",
    "url_scheme": "must be a URL that begins with {expected_schemes}",
    "datetime_type": "must be a date and time",
    "datetime_parsing": "must be a date and time",
    "datetime_from_date_parsing": "must be a date and time",
    "timezone_aware": "must have a time zone",
    "date_type": "must be a date",
    "date_parsing": "must be a date",
    "date_from_datetime_parsing": "must be a date",
}
"""What each kind of mistake is called; braces hold what pydantic knows of the setting's bounds."""


def plain_words(mistake: Mapping[str, Any]) -> str:
    """What is wrong with a value, as one would say it to a colleague.

    Args:
        mistake: One of `ValidationError.errors()`.
    """
    if mistake["type"] in {"value_error", "assertion_error"}:   # our own rules, in our own words
        return str(mistake["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    words = _WORDS.get(mistake["type"])
    if words is None:
        return f"is not valid here ({mistake['type'].replace('_', ' ')})"
    return words.format_map({name: _number(value) for name, value in mistake.get("ctx", {}).items()})


def first_mistake(mistakes: Sequence[Mapping[str, Any]]) -> ConfigError:
    """The mistake of a configuration that its author most likely meant, as field, value and remedy.

    Args:
        mistakes: `ValidationError.errors()`, at least one.
    """
    # Unions report every member they tried: the user meant the section with the fewest mistakes, then the longest path,
    # then what breaks a rule of ours.
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
    if not field:  # a rule between sections: its message begins with the field
        field, _, message = message.partition(" ")
        return ConfigError(field, None, message)
    if isinstance(first["input"], (dict, BaseModel)):
        return ConfigError(field, None, message)
    return ConfigError(field, first["input"], message)


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _section(mistake: Mapping[str, Any]) -> str | None:
    """Which of `model.init`'s sections was tried."""
    return next((name for name in map(_init_in, mistake["loc"]) if name is not None), None)


def _init_in(part: object) -> str | None:
    # pydantic's tag of a section is its name, or `function-after[check(), Name]`.
    return next((name for name in _INITS if name in str(part)), None)


def _known_keys(path: list[str]) -> list[str]:
    schema: dict[str, Any] = RunConfig.model_json_schema()
    nodes: list[dict[str, Any]] = [schema]
    for part in path:
        found = [node.get("items", {}) if part.isdigit() else node.get("properties", {}).get(part, {}) for node in nodes]
        options = [option for node in found for option in (node, *node.get("anyOf", []))]
        nodes = [schema["$defs"][option["$ref"].rsplit("/", 1)[-1]] for option in options if "$ref" in option] or found
    return [key for node in nodes for key in node.get("properties", {})]
