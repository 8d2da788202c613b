"""Text that would harm a terminal, put wherever a document of another user may hold text."""

from __future__ import annotations

import copy
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

CLEAR, CLIPBOARD, HIDDEN = "\x1b[2J", "\x1b]52;c;c2VjcmV0\x07", "\x1b[8m"
HOSTILE = f"{CLEAR}{CLIPBOARD}{HIDDEN}\x9b31m\x9d\x7f\x08\x0c\r\u202e\u2028\u2066x"
_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_OF_RICH = re.compile(
    r"\x1b\[(?:[013457]|2|9\d|3\d|4\d|38;5;\d+|38;2;[\d;]+|[;\d]+)?m|\x1b\[\d*[ABK]|\x1b\[\?25[lh]|\r"
)
"""Colours, and what redraws a live view: line up, erase the line, hide the cursor."""
_MOST = 3
"""Entries of a list that become hostile; the others are shown in the same way."""


def control_characters(output: str, *, live: bool = False) -> list[str]:
    """Characters of an output that a terminal would obey, except for newlines and tabs.

    Args:
        output: What a command has written.
        live: Whether colours and a live view are expected. What hides text is never.
    """
    assert HIDDEN not in output
    shown = _OF_RICH.sub("", output) if live else output
    return sorted(
        {
            f"U+{ord(each):04X}"
            for each in shown
            if (unicodedata.category(each) in ("Cc", "Zl", "Zp", "Cs") and each not in "\n\t") or each in _BIDI
        }
    )


def poisoned(document: Any, accepts: Callable[[Any], bool]) -> Any:
    """A JSON document with hostile text in each string, and under each key, where its reader accepts that."""
    made = json.loads(json.dumps(document))
    for holder, key in list(_strings(made)):
        before = holder[key]
        holder[key] = before + HOSTILE
        if not accepts(copy.deepcopy(made)):
            holder[key] = before
    for mapping in list(_mappings(made)):
        if mapping:
            mapping[HOSTILE] = copy.deepcopy(next(iter(mapping.values())))
            if not accepts(copy.deepcopy(made)):
                del mapping[HOSTILE]
    return made


def _strings(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value[:_MOST]) if isinstance(value, list) else ()
    for key, entry in entries:
        if isinstance(entry, str):
            yield value, key
        yield from _strings(entry)


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    entries = value.values() if isinstance(value, dict) else value[:_MOST] if isinstance(value, list) else ()
    for entry in entries:
        yield from _mappings(entry)
