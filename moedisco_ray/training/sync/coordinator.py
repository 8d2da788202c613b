"""The sync coordinator: records who is combined at the next sync point, and completes it.

The members combine. The coordinator exchanges names and checksums with them through a board, and reads and writes small
records in the run's storage; no weights pass through its process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.policies.sync_points import Arrival, SyncProgress, Turn, ready_members
from moedisco_ray.training.job import TrainJob
from moedisco_ray.training.sync.files import Roster, SyncPoint


class MemberBoard(Protocol):
    """A member's side of the board of sync points; see `execution.sync_board`."""

    def arrive(self, arrival: Arrival) -> None:
        """Say that a member has published its weights; returns when the board knows."""

    def turn(self, name: str, number: int) -> Turn:
        """Ask what a member does next at a sync point."""

    def finish(self, number: int, place: int, files: Mapping[str, Entry]) -> None:
        """Say that a range of a sync point is combined and stored, in these files."""


class Board(MemberBoard, Protocol):
    """Both sides of the board of sync points."""

    def begin(self, completed: int) -> None:
        """Continue with the sync point after a completed one."""

    def open(self, ranges: int) -> None:
        """Have the members combine: the roster of the sync point is recorded."""

    def progress(self) -> SyncProgress:
        """The progress of the sync point."""

    def arrivals(self) -> dict[str, Arrival]:
        """The arrivals of the members so far, by name."""

    def files(self) -> dict[str, Entry]:
        """All files of the combined ranges."""


class SyncCoordinator:
    """Coordinates the sync points of some trainings; without a sync plan it does nothing.

    It can restart at any time: all state that it needs is in files.

    Args:
        jobs: The members; what they exchange is equal in their start models.
        board: Board that the members use.
        emit: Receives a `sync` event for each sync point.
        clock: Function that returns the time in seconds on a monotonic clock.

    Raises:
        DamagedError: A record of the next sync point is damaged.
    """

    def __init__(
        self, jobs: Sequence[TrainJob], board: Board, emit: Emit, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._members = [job.name for job in jobs]
        self._board = board
        self._emit = emit
        self._clock = clock
        self._plan = jobs[0].sync
        self._stage = jobs[0].stage
        self._arrived: dict[str, float] = {}
        self._roster: Roster | None = None
        self._opened = clock()
        if self._plan is None:
            return
        completed = SyncPoint(self._plan.directory, 0, self._plan.store, self._stage).latest()
        board.begin(completed.number)
        if completed.number:
            completed.clean_up()  # a driver that died may have completed it and deleted nothing
        self._next = SyncPoint(completed.directory, completed.number + 1, completed.store, completed.stage)
        if not self.is_over:
            for arrival in self._next.arrivals(self._members):
                board.arrive(arrival)
            if self._next.has_roster:
                self._open(self._next.roster())

    @property
    def is_over(self) -> bool:
        """Whether no sync point is left."""
        return self._plan is None or self._next.number > len(self._plan.steps)

    def is_waiting(self, name: str) -> bool:
        """Whether a member has published its weights, and other members have not yet."""
        if self.is_over or self._roster is not None:
            return False
        return name in self._board.progress().arrived

    def remove(self, name: str) -> None:
        """Remove a member whose training was given up; the others no longer wait for it."""
        self._members.remove(name)

    def advance(self) -> bool:
        """Record the members of the next sync point or complete it, if it is time; return whether it was.

        Raises:
            DamagedError: A record is damaged.
            RunDirError: The disk is full.
        """
        if self._plan is None or self.is_over:
            return False
        progress = self._board.progress()
        if self._roster is not None:
            if progress.combined < self._roster.ranges:
                return False
            self._complete(self._roster)
            return True
        now = self._clock()
        for name in progress.arrived:
            self._arrived.setdefault(name, now)
        ready = ready_members(self._members, self._arrived, now, self._plan.patience)
        if ready is None:
            return False
        self._open(self._next.record_roster(ready, self._board.arrivals(), self._plan.ranges))
        return True

    def _open(self, roster: Roster) -> None:
        self._opened = self._clock()
        self._roster = roster
        self._board.open(roster.ranges)

    def _complete(self, roster: Roster) -> None:
        assert self._plan is not None  # noqa: S101  # without a plan there is no roster
        point = self._next
        point.complete(roster, self._board.files())
        completed = self._clock()
        self._next = SyncPoint(point.directory, point.number + 1, point.store, point.stage)
        self._roster, self._arrived = None, {}
        self._board.begin(point.number)  # members load, while this process deletes many files
        point.clean_up()
        self._emit(
            Event(
                "sync",
                self._stage,
                data={
                    "sync": point.number,
                    "syncs": len(self._plan.steps),
                    "members": [each.name for each in roster.members],
                    "late": list(roster.late),
                    "seconds": round(completed - self._opened, 3),
                },
            )
        )
