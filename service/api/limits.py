"""How much one token or address may ask for: requests per minute, and streams at once."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import resource
import threading
import time
from collections.abc import Callable, Iterator

from service.errors import TooMany

_MOST_BUCKETS = 10_000
_PLACE_SECONDS = 5.0
"""When to ask for a stream again (s): one may end at any time."""
_RESERVED = 192
"""Descriptors kept for the database, the thread pool, Ray's API, and connections that are accepted before one can be closed."""
_LEAST, _MOST = 32, 4096
"""Connections: fewer are no service; each idle one takes about 20 KB, and browsers and clients keep theirs open."""
_UNLIMITED = 2**20
"""Limit to ask for where the hard limit is infinite: Linux refuses infinity for descriptors."""


class RateLimiter:
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


class StreamSlots:
    """Places for long answers (event streams, followed logs, downloads), so many for each token and so many in all.

    Args:
        most: Places in all.
        each: Places of one token.
    """

    def __init__(self, most: int, each: int) -> None:
        self._most = most
        self._each = each
        self._lock = threading.Lock()
        self._taken: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def taken(self, key: str) -> Iterator[None]:
        """Hold a place inside the block.

        Args:
            key: The token's id.

        Raises:
            TooMany: The token, or the service, has no place left.
        """
        with self._lock:
            if self._taken[key] >= self._each:
                raise TooMany(f"this token may have {self._each} streams and downloads open; close some first", _PLACE_SECONDS)
            if self._taken.total() >= self._most:
                raise TooMany(f"the service takes {self._most} streams and downloads at once; try again later", _PLACE_SECONDS)
            self._taken[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[key] -= 1
                if not self._taken[key]:
                    del self._taken[key]


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Limits of one service process.

    Attributes:
        connections: Open connections above which the ones that wait longest for their client are closed.
        streams: Answers without an end, or as long as a file, under way at once: at most half of the connections, so that
            short requests always find room.
    """

    connections: int
    streams: int


def raise_descriptor_limit() -> int:
    """Raise the soft limit on open files to the hard limit; returns the limit that now holds."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _UNLIMITED if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return descriptor_limit()


def descriptor_limit() -> int:
    """The soft limit on open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft


def capacity(descriptors: int) -> Capacity:
    """The limits that a number of file descriptors allows: each connection may hold one more, of the file that it is sent."""
    connections = min(_MOST, max(_LEAST, (descriptors - _RESERVED) // 2))
    return Capacity(connections, connections // 2)
