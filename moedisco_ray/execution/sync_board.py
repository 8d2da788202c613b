"""The board of a group's sync points: which members have arrived, and which of them combines which range.

It knows names, numbers and checksums, never weights. Members and coordinator send it short messages; in a run on Ray it
is part of the run's mailbox actor. It may be lost at any time: all that must outlive it is in the files of the sync
points, from which a new coordinator fills a new board.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.policies.sync_points import Arrival, SyncProgress, Turn

_FEWEST_SECONDS = 10.0
"""Minimum time that a member gets to combine a range before another one combines it too (s)."""
_SLOWEST = 3.0
"""Factor on the longest time that a range of the sync has taken, after which another member combines it too: the first
one may be dead, or hang."""


class SyncBoard:
    """Tracks the sync point after the last completed one.

    Args:
        clock: Function that returns the time in seconds on a monotonic clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin(0)

    def begin(self, completed: int) -> None:
        """Continue with the sync point after a completed one."""
        self._completed = completed
        self._arrived: dict[str, Arrival] = {}
        self._ranges = 0
        self._claims: dict[int, tuple[str, float]] = {}
        self._combined: dict[int, dict[str, Entry]] = {}
        self._longest = 0.0

    def arrive(self, arrival: Arrival) -> None:
        """Note that a member has published its weights."""
        if arrival.number == self._completed + 1:
            self._arrived.setdefault(arrival.name, arrival)

    def open(self, ranges: int) -> None:
        """Have the members combine: the roster of the sync point is recorded."""
        self._ranges = ranges

    def turn(self, name: str, number: int) -> Turn:
        """What a member does next at a sync point."""
        if number <= self._completed:
            return Turn("load", self._completed)
        if name not in self._arrived:
            return Turn("arrive")
        if not self._ranges:
            return Turn("wait")
        found = self._claim(name)
        return Turn("stay") if found is None else Turn("combine", found)

    def finish(self, number: int, place: int, files: Mapping[str, Entry]) -> None:
        """Note that a range of a sync point is combined and stored, in these files."""
        if number == self._completed + 1 and place in self._claims:
            self._longest = max(self._longest, self._clock() - self._claims[place][1])
            self._combined.setdefault(place, dict(files))

    def progress(self) -> SyncProgress:
        """The progress of the sync point, for the coordinator."""
        return SyncProgress(frozenset(self._arrived), self._ranges, len(self._combined))

    def arrivals(self) -> dict[str, Arrival]:
        """The arrivals of the members so far, by name."""
        return dict(self._arrived)

    def files(self) -> dict[str, Entry]:
        """All files of the combined ranges."""
        return {name: entry for place in sorted(self._combined) for name, entry in self._combined[place].items()}

    def _claim(self, name: str) -> int | None:
        """A range for a member: one that it had before it was restarted, a new one, or one that takes another long."""
        now = self._clock()
        left = [place for place in range(self._ranges) if place not in self._combined]
        own = (place for place in left if self._claims.get(place, ("", 0.0))[0] == name)
        free = (place for place in left if place not in self._claims)
        patience = max(_FEWEST_SECONDS, _SLOWEST * self._longest)
        late = (place for place in left if place in self._claims and now > self._claims[place][1] + patience)
        found = next((place for places in (own, free, late) for place in places), None)
        if found is not None:
            self._claims[found] = (name, now)
        return found
