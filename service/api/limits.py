"""How many requests are taken from one token or address: a token bucket for each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from service.errors import TooMany

_MOST_BUCKETS = 10_000


class Limits:
    """Token buckets that hold a minute's requests and fill evenly.

    Args:
        per_minute: Requests.
        clock: Seconds that only grow.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = float(per_minute)
        self._rate = per_minute / 60
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> None:
        """Take one request from a bucket.

        Args:
            key: Whose bucket.

        Raises:
            TooMany: It is empty; says when there is one more.
        """
        with self._lock:
            now = self._clock()
            if len(self._buckets) >= _MOST_BUCKETS:
                self._forget(now)
            left, then = self._buckets.get(key, (self._capacity, now))
            left = min(self._capacity, left + (now - then) * self._rate)
            if left < 1:
                wait = (1 - left) / self._rate
                raise TooMany(f"more than {self._capacity:.0f} requests in a minute; wait {wait:.1f} s", wait)
            self._buckets[key] = (left - 1, now)

    def _forget(self, now: float) -> None:
        # A full bucket is what an absent one counts as. Where nobody's is full, the longest unused half goes.
        kept = {key: bucket for key, bucket in self._buckets.items() if bucket[0] + (now - bucket[1]) * self._rate < self._capacity}
        if len(kept) >= _MOST_BUCKETS:
            newest = sorted(kept.items(), key=lambda item: item[1][1])[_MOST_BUCKETS // 2:]
            kept = dict(newest)
        self._buckets = kept
