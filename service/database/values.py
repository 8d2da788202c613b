"""Sanitises values from outside so that they can be stored and sent.

PostgreSQL text cannot contain NUL, UTF-8 cannot encode lone surrogates, JSON has no NaN, and integer columns have 64
bits.
"""

from __future__ import annotations

import math
import re
from typing import Any

LARGEST = 2**63 - 1
_UNFIT = re.compile("[\x00\ud800-\udfff]")
_DEEPEST = 60
"""Maximum nesting depth of a stored value; JSON parsers also have limits."""


def text(value: str, most: int | None = None) -> str:
    """The text cut to `most` characters, with characters that cannot be stored replaced."""
    fit = value if value.isascii() and "\x00" not in value else _UNFIT.sub("\ufffd", value)
    return fit[:most]


def document(value: Any, depth: int = 0) -> Any:
    """The JSON value with sanitised texts, and null in place of numbers that are not finite."""
    if isinstance(value, str):
        return text(value)
    if value is None or isinstance(value, int | float):
        return value if not isinstance(value, float) or math.isfinite(value) else None
    if depth == _DEEPEST:
        return None
    if isinstance(value, dict):
        return {text(str(key)): document(child, depth + 1) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [document(child, depth + 1) for child in value]
    return text(str(value))


def named_document(values: dict[str, Any]) -> dict[str, Any]:
    """Sanitise an event's data with `document`; NaN and infinite values also go to a field `not_finite` as text."""
    lost = {key: str(value) for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    fit: dict[str, Any] = document(values)
    return {**fit, "not_finite": document(lost)} if lost else fit


def number(value: Any) -> float | None:
    """A finite float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def whole(value: Any) -> int | None:
    """A non-negative integer that fits into a 64-bit column; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST else None
