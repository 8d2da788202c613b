"""Bounds of a whole configuration, checked before its settings because a service reads those of many users."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MOST_ENTRIES = 4096
"""Maximum number of entries of a list or mapping."""
MOST_VALUES = 50_000
"""Maximum number of values in all lists and mappings together: 1000 sources with 50 settings each."""
MOST_LEVELS = 100
"""Maximum number of lists and mappings inside each other: most code calls itself per level, and Python allows 1000."""
_WHOLE = "configuration"
_LONGEST_PATH = 200
"""Maximum characters of a setting's name in a message: a key of the configuration may be any text."""


def check_extent(raw: Any) -> Any:
    """Refuse a configuration with too many values or levels, in a time that does not depend on their number.

    Raises:
        ValueError: A list or mapping has too many entries, or all have, or too many are inside each other.
    """
    values, left = 0, [(_WHOLE, raw, 1)]
    while left:
        path, value, level = left.pop()
        if not isinstance(value, dict | list | tuple):
            continue
        if level > MOST_LEVELS:
            raise ValueError(
                f"{path} has more than {MOST_LEVELS} lists and mappings inside each other; write fewer levels"
            )
        if len(value) > MOST_ENTRIES:
            raise ValueError(f"{path} has {len(value)} entries, more than {MOST_ENTRIES}; shorten it")
        values += len(value)
        if values > MOST_VALUES:
            raise ValueError(
                f"{_WHOLE} has more than {MOST_VALUES} values; shorten it, or name folders instead of files"
            )
        named: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
        above = "" if path == _WHOLE else f"{path}."
        left += [(f"{above}{key}"[:_LONGEST_PATH], each, level + 1) for key, each in named]
    return raw
