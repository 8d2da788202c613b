"""The sync coordinator: tracks which members have reached the next sync point, and makes the outer step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.policies.sync_points import SyncMembers, ready_members
from moedisco_ray.training.job import TrainJob
from moedisco_ray.training.sync import exchange

_LOOK_SECONDS = 3.0
"""Minimum seconds between two checks whether a member has published its weights. Only used for runs at a URI, where
each check is a request."""


class SyncCoordinator:
    """Coordinates the sync points of some trainings; without a sync plan it does nothing.

    It can restart at any time: all state that it needs is in files.

    Args:
        jobs: The members; what they exchange is equal in their start models.
        emit: Receives a `sync` event for each sync point.
        clock: Function that returns the time in seconds on a monotonic clock.
    """

    def __init__(self, jobs: Sequence[TrainJob], emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._first = jobs[0]
        self._members = [job.name for job in jobs]
        self._emit = emit
        self._clock = clock
        self._plan = jobs[0].sync
        self._completed = 0 if self._plan is None else exchange.latest(self._plan.directory, store=self._plan.store)
        self._arrived: dict[str, float] = {}
        self._next_looks: dict[str, float] = {}

    def is_waiting(self, name: str) -> bool:
        """Whether a member has published its weights for the next sync point and waits for the result."""
        if self._plan is None:
            return False
        if name in self._arrived:
            return True
        now = self._clock()
        if self._plan.store.is_remote and now < self._next_looks.get(name, now):
            return False
        self._next_looks[name] = now + _LOOK_SECONDS
        return exchange.has_published(self._plan.directory, self._completed + 1, name, self._plan.store)

    def remove(self, name: str) -> None:
        """Remove a member whose training was given up; the others no longer wait for it."""
        self._members.remove(name)

    def ready_members(self) -> SyncMembers | None:
        """The members to combine now; None if the sync point must wait for more, or if no sync point is left."""
        if self._plan is None or self._completed == len(self._plan.steps):
            return None
        now = self._clock()
        for name in self._members:
            if name not in self._arrived and self.is_waiting(name):
                self._arrived[name] = now
        return ready_members(self._members, self._arrived, now, self._plan.patience)

    def combine(self, members: SyncMembers) -> None:
        """Make the outer step of the next sync point.

        Raises:
            DamagedError: What a member or the last sync point has written is damaged.
            RunDirError: The disk is full.
        """
        assert self._plan is not None  # noqa: S101  # without a plan no members are ready
        started, number = self._clock(), self._completed + 1
        exchange.combine(
            self._plan.directory,
            number,
            self._first.model,
            members,
            self._plan.outer,
            store=self._plan.store,
            stage=self._first.stage,
        )
        self._completed = number
        self._arrived = {}
        self._emit(
            Event(
                "sync",
                self._first.stage,
                data={
                    "sync": number,
                    "syncs": len(self._plan.steps),
                    "members": list(members.members),
                    "late": list(members.late),
                    "seconds": round(self._clock() - started, 3),
                },
            )
        )
