"""pydantic's error types in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    "union_tag_not_found": "must have {discriminator}",
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
"""Message for each error type of pydantic; braces stand for the bounds of the setting."""


def plain_words(mistake: Mapping[str, Any]) -> str:
    """The message for one validation error.

    Args:
        mistake: An entry of `ValidationError.errors()`.
    """
    if mistake["type"] in {"value_error", "assertion_error"}:  # our own rules, in our own words
        return str(mistake["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    words = _WORDS.get(mistake["type"])
    if words is None:
        return f"is not valid here ({mistake['type'].replace('_', ' ')})"
    return words.format_map({name: _number(value) for name, value in mistake.get("ctx", {}).items()})


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
