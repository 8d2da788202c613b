"""Mistakes in requests, in the words of `moedisco validate`, and the strict parsing of JSON."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel, TypeAdapter, ValidationError

from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import UserError, masked
from service.errors import BadRequest, InvalidRequest

LARGEST = 2**53
"""Largest integer that every JSON parser reads exactly."""
NO_OBJECT = "must be a JSON object, with the header Content-Type: application/json"

_WRITE_ONLY = frozenset({"value", "url", "token", "code"})
"""Fields of requests with secrets, which no answer quotes."""
_LONGEST_VALUE = 200
_MOST_SHOWN = 20
_LONGEST_SEARCHED = 10_000
_SUSPECT = tuple(re.compile(pattern) for pattern in (rb"\\u0000", rb"\d{16}", rb"[eE]\+?\d{3}"))
"""Patterns of values that may be invalid; a body without them needs no check. One combined pattern would take twice as
long."""

_TYPES: Mapping[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}

T = TypeVar("T", bound=BaseModel)
FieldAndMessage = tuple[str, str]
"""Dotted path of a mistake, and what is wrong there."""


def mistakes_in(error: UserError) -> list[FieldAndMessage]:
    """The mistakes that a `UserError` reports in a run's configuration, with their fields below `config`."""
    return [
        (f"config.{each.field}" if each.field else "config", in_words(each.value, each.remedy))
        for each in (error, *error.others)
    ]


def mistakes_of(found: Sequence[Mapping[str, Any]]) -> list[FieldAndMessage]:
    """Mistakes for validation errors of pydantic; for a run's configuration they have the words of `moedisco validate`.

    Args:
        found: The errors; their places begin with the part of the request, such as `body`.
    """
    config = [{**mistake, "loc": mistake["loc"][2:]} for mistake in found if mistake["loc"][:2] == ("body", "config")]
    others = [_mistake(mistake) for mistake in found if mistake["loc"][:2] != ("body", "config")]
    if config and not (len(config) == 1 and not config[0]["loc"] and config[0]["type"] != "value_error"):
        return [*mistakes_in(first_mistake(config)), *others]
    return [*(_mistake({**mistake, "loc": ("body", "config")}) for mistake in config), *others]


def converted(schema: TypeAdapter[Any], raw: Any) -> tuple[FieldAndMessage, ...]:
    """Up to 20 values whose type differs from the published schema, so that validation would convert them.

    For example, it converts "1" to 1, and 1 to true. A whole number is also a number. Validation itself converts,
    because people write configurations and policies in YAML.

    Args:
        schema: Schema of the document.
        raw: The document from JSON.

    Raises:
        ValidationError: The document is not valid.
    """
    read = schema.dump_python(schema.validate_python(raw), mode="json", exclude_unset=True, warnings=False)
    return tuple(itertools.islice(_conversions(raw, read, ""), _MOST_SHOWN))


def strict_json(body: bytes) -> Any:
    """Parse JSON.

    Raises:
        BadRequest: The body is not JSON, is nested too deeply, or contains a lone surrogate or NaN.
        InvalidRequest: A text contains a NUL character, or a number is beyond `LARGEST`.
    """
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if any(pattern.search(body) for pattern in _SUSPECT) and (mistake := _unfit(value, ("body",))) is not None:
        raise InvalidRequest(mistakes_of([mistake]))
    return value


def parsed(model: type[T], body: bytes) -> T:
    """Parse and validate the JSON of a request.

    Raises:
        BadRequest: The body is not JSON.
        InvalidRequest: The body is missing, or does not match its schema.
    """
    if not body:
        raise InvalidRequest([("body", "is missing")])
    raw = strict_json(body)
    try:
        if mistakes := converted(TypeAdapter(model), raw):
            raise InvalidRequest(mistakes)
        return model.model_validate(raw)
    except ValidationError as error:
        found = [{**mistake, "loc": ("body", *mistake["loc"])} for mistake in error.errors(include_url=False)]
        raise InvalidRequest(mistakes_of(found)) from error


def _conversions(raw: Any, read: Any, place: str) -> Iterator[FieldAndMessage]:
    if isinstance(raw, dict) and isinstance(read, dict):
        for key in raw.keys() & read.keys():
            yield from _conversions(raw[key], read[key], f"{place}.{key}" if place else key)
    elif isinstance(raw, list) and isinstance(read, list) and len(raw) == len(read):
        for i, (one, other) in enumerate(zip(raw, read, strict=True)):
            yield from _conversions(one, other, f"{place}.{i}")
    elif (
        type(raw) in _TYPES
        and type(read) in _TYPES
        and type(raw) is not type(read)
        and (type(raw), type(read)) != (int, float)
    ):
        yield place, in_words(_scalar(raw), f"must be {_TYPES[type(read)]}, not {_TYPES[type(raw)]}")


def _unfit(value: Any, place: tuple[str | int, ...]) -> dict[str, Any] | None:
    if isinstance(value, str) and "\0" in value:
        return {"type": "nul", "loc": place, "msg": "contains a NUL character", "input": None}
    if isinstance(value, int) and abs(value) > LARGEST:
        return {"type": "large", "loc": place, "msg": f"is beyond {LARGEST}", "input": None}
    if isinstance(value, float) and not math.isfinite(value):
        return {"type": "infinite", "loc": place, "msg": "is too large", "input": None}
    if isinstance(value, list):
        return next((found for i, child in enumerate(value) if (found := _unfit(child, (*place, i)))), None)
    if isinstance(value, dict):
        names = (_unfit(key, place) for key in value)
        children = (_unfit(child, (*place, key)) for key, child in value.items())
        return next((found for part in (names, children) for found in part if found), None)
    return None


def _mistake(found: Mapping[str, Any]) -> FieldAndMessage:
    parts = [str(part) for part in found["loc"]]
    field = ".".join(parts[1:]) or parts[0]
    match found["type"]:
        case "missing":
            return field, "is missing"
        case "extra_forbidden":
            return field, "no such field; remove it"
        case "model_attributes_type" | "model_type" if found["loc"] == ("body",):
            return field, NO_OBJECT
        case _:
            shown = None if parts[-1] in _WRITE_ONLY else _scalar(found.get("input"))
            return field, in_words(shown, plain_words(found))


def _scalar(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _LONGEST_SEARCHED:
        return None  # do not quote a value that is too long to be searched for credentials
    return value if isinstance(value, str | int | float | bool) else None


def in_words(value: Any, remedy: str) -> str:
    """The message of a mistake: the value, shortened and with credentials masked, and the remedy."""
    if value is None:
        return remedy.replace("\n", " ")
    shown = masked(repr(value))
    if len(shown) > _LONGEST_VALUE:
        shown = shown[:_LONGEST_VALUE] + "..."
    return f"{shown}: {remedy}".replace("\n", " ")
