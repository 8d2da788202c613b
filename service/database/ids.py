"""ULIDs: 48 bits of milliseconds and 80 random bits in Crockford's base 32, so that text order is order of creation."""

from __future__ import annotations

import re
import secrets
import threading
import time

_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LENGTH = 26
_PATTERN = re.compile(f"[0-7][{_DIGITS}]{{{_LENGTH - 1}}}")
_RANDOM_BITS = 80
_LOWER_HALF = 2 ** (_RANDOM_BITS - 1)


class Ulids:
    """Makes ids that only grow, within one millisecond and when the clock is set back too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def __call__(self) -> str:
        """The next one; from any thread."""
        # Starting in the lower half leaves room to count upwards within the millisecond.
        fresh = time.time_ns() // 1_000_000 << _RANDOM_BITS | secrets.randbelow(_LOWER_HALF)
        with self._lock:
            self._last = max(fresh, self._last + 1)
            number = self._last
        return "".join(_DIGITS[number >> 5 * place & 31] for place in reversed(range(_LENGTH)))


new_id = Ulids()
"""A new id; those of one process are in order of creation."""


def is_id(text: str) -> bool:
    """Whether a text has the form of an id; nothing else need be looked up."""
    return _PATTERN.fullmatch(text) is not None
