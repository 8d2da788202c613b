"""How many connections and streams fit into the process's file descriptors."""

from __future__ import annotations

import dataclasses
import resource

_RESERVED = 192
"""Descriptors kept for the database, the thread pool, Ray's API, and connections that are accepted before one can be closed."""
_LEAST, _MOST = 32, 4096
"""Connections: fewer are no service; each idle one takes about 20 KB, and browsers and clients keep theirs open."""
_UNLIMITED = 2**20
"""Limit to ask for where the hard limit is infinite: Linux refuses infinity for descriptors."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """RateLimiter of one service process.

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
