"""ULIDs: 48 bits of milliseconds and 80 random bits in Crockford's base 32, which sort by time of creation."""

from __future__ import annotations

import secrets
import threading
import time

from service.domain.run_paths import ULID_DIGITS, ULID_LENGTH

_RANDOM_BITS = 80
_LOWER_HALF = 2 ** (_RANDOM_BITS - 1)


class Ulids:
    """Generates increasing ids, even within one millisecond and after the clock was set back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def __call__(self) -> str:
        """The next id; safe from any thread."""
        # A random start in the lower half leaves room to count up for more ids in the same millisecond.
        fresh = time.time_ns() // 1_000_000 << _RANDOM_BITS | secrets.randbelow(_LOWER_HALF)
        with self._lock:
            self._last = max(fresh, self._last + 1)
            number = self._last
        return "".join(ULID_DIGITS[number >> 5 * place & 31] for place in reversed(range(ULID_LENGTH)))


new_id = Ulids()
"""Returns a new id, larger than all earlier ids of this process."""
