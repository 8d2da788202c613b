"""Limits on requests per minute, concurrent streams, and connections."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import resource
import threading
import time
from collections.abc import Callable, Iterator

from service.errors import TooMany

_MOST_BUCKETS = 10_000
_SLOT_WAIT = 5.0
"""Wait that is suggested to a client that got no stream slot, in seconds."""
_RESERVED = 192
"""File descriptors reserved for the database, threads, Ray's API, and connections accepted before one can be closed."""
_LEAST, _MOST = 32, 4096
"""Bounds on the connection limit; an idle connection takes about 20 KB, and browsers and clients keep connections
open."""
_UNLIMITED = 2**20
"""Limit on open files to request if the hard limit is infinite, because Linux refuses infinity here."""


@dataclasses.dataclass(frozen=True)
class Allowance:
    """Requests that a caller may still send, for the headers of draft-ietf-httpapi-ratelimit-headers.

    Attributes:
        limit: Requests per minute.
        left: Requests that may be sent at once.
        seconds: Time until the whole limit is available again.
    """

    limit: int
    left: int
    seconds: float

    @property
    def headers(self) -> dict[str, str]:
        return {
            "RateLimit-Policy": f'"requests";q={self.limit};w=60',
            "RateLimit": f'"requests";r={self.left};t={math.ceil(self.seconds)}',
        }


class RateLimiter:
    """Limits the requests per minute of each key, with a token bucket that holds one minute's requests for each."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = float(per_minute)
        self._rate = per_minute / 60
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> Allowance:
        """Take one request from the bucket of a key; returns what is left.

        Raises:
            TooMany: The bucket is empty; the error says when to try again.
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
        return Allowance(int(self._capacity), int(left - 1), (self._capacity - left + 1) / self._rate)

    def _forget(self, now: float) -> None:
        # A key without a bucket has its full allowance, so drop full buckets. If too many remain, also drop the older
        # half of them.
        kept = {
            key: bucket
            for key, bucket in self._buckets.items()
            if bucket[0] + (now - bucket[1]) * self._rate < self._capacity
        }
        if len(kept) >= _MOST_BUCKETS:
            newest = sorted(kept.items(), key=lambda item: item[1][1])[_MOST_BUCKETS // 2 :]
            kept = dict(newest)
        self._buckets = kept


class StreamSlots:
    """Slots for long responses (event streams, followed logs, downloads): `each` per token, `most` in total."""

    def __init__(self, most: int, each: int) -> None:
        self._most = most
        self._each = each
        self._lock = threading.Lock()
        self._taken: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def taken(self, key: str) -> Iterator[None]:
        """Hold a slot of the token with the id `key` inside a `with` block.

        Raises:
            TooMany: No slot of the token or of the service is free.
        """
        with self._lock:
            if self._taken[key] >= self._each:
                raise TooMany(
                    f"this token has {self._each} streams and downloads open, the limit; close some first", _SLOT_WAIT
                )
            if self._taken.total() >= self._most:
                raise TooMany(
                    f"the service has {self._most} streams and downloads open, the limit; try again later", _SLOT_WAIT
                )
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
        connections: Maximum number of open connections; beyond it, those that have been idle for longest are closed.
        streams: Maximum number of concurrent streams and downloads: half of the connections, so that others remain for
            requests.
    """

    connections: int
    streams: int


def raise_descriptor_limit() -> int:
    """Raise the soft limit on open files to the hard limit; returns the new limit."""
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
    """Limits of a process that may have `descriptors` files open; a connection that sends a file needs two."""
    connections = min(_MOST, max(_LEAST, (descriptors - _RESERVED) // 2))
    return Capacity(connections, connections // 2)
