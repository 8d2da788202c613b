"""How long to go on trying, and how long to wait between two attempts."""

from __future__ import annotations

import dataclasses
import email.utils
import random
import time
from collections.abc import Callable, Mapping

PASSING = frozenset({429, 502, 503, 504})
"""Statuses that a later attempt may not meet."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """For a service that is restarted, overloaded or cut off.

    Attributes:
        seconds: From the first failure after something went well until it is given up; 0: never try again.
        first: Wait after the first failure, in seconds; it doubles with each further one.
        longest: Longest wait that is not asked for by the service, in seconds.
    """

    seconds: float = 60.0
    first: float = 0.25
    longest: float = 10.0


DEFAULT = Patience()


class Attempts:
    """Counts failures in a row and says how long to wait after each."""

    def __init__(
        self, patience: Patience, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random,
    ) -> None:
        self._patience = patience
        self._clock = clock
        self._jitter = jitter
        self._failures = 0
        self._deadline = 0.0

    def went_well(self) -> None:
        """Start counting anew."""
        self._failures = 0

    def pause(self, asked: float | None = None) -> float | None:
        """Seconds to wait after one more failure; None: patience is over.

        Args:
            asked: Seconds the service asked for (`Retry-After`); never less is waited.
        """
        now = self._clock()
        if not self._failures:
            self._deadline = now + self._patience.seconds
        left = self._deadline - now
        # Waits of many clients spread over half the interval, so that they do not all come back at once.
        grown = self._patience.first * 2.0 ** min(self._failures, 32)
        wait = min(self._patience.longest, grown) * (0.5 + self._jitter() / 2)
        self._failures += 1
        if left <= 0 or (asked or 0.0) > left:
            return None
        return max(asked or 0.0, min(wait, left))


def retry_after(headers: Mapping[str, str], now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a `Retry-After` header asks for, given as a number or as a date; None: nothing readable."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now())
    except ValueError:
        return None
