"""The keeper of rounds: sees who has arrived, and makes the outer step when it is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from moedisco_ray.core.events import Emit, Event
from moedisco_ray.policies.sync_points import SyncMembers, gather
from moedisco_ray.training.job import TrainJob
from moedisco_ray.training.sync import exchange


class SyncCoordinator:
    """Of jobs without rounds it has nothing to do.

    All that it must know after a restart is in the files.

    Args:
        jobs: The members. What they start from has one backbone.
        emit: Receives a `round` event for each.
        clock: In seconds.
    """

    def __init__(self, jobs: Sequence[TrainJob], emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._first = jobs[0]
        self._alive = [job.name for job in jobs]
        self._emit = emit
        self._clock = clock
        self._rounds = jobs[0].rounds
        self._closed = 0 if self._rounds is None else exchange.newest(self._rounds.directory)
        self._arrived: dict[str, float] = {}

    def waits(self, name: str) -> bool:
        """Whether a member has ended the open round, so that there is nothing for it to do."""
        return self._rounds is not None and exchange.has_posted(self._rounds.directory, self._closed + 1, name)

    def drop(self, name: str) -> None:
        """A member was given up: nobody waits for it any longer."""
        self._alive.remove(name)

    def due(self) -> SyncMembers | None:
        """Whom to combine now; None: nobody yet."""
        if self._rounds is None or self._closed == len(self._rounds.at):
            return None
        now = self._clock()
        for name in self._alive:
            if name not in self._arrived and self.waits(name):
                self._arrived[name] = now
        return gather(self._alive, self._arrived, now, self._rounds.patience)

    def close(self, gathering: SyncMembers) -> None:
        """Make the outer step of the open round.

        Raises:
            RunDirError: The disk is full.
        """
        assert self._rounds is not None  # noqa: S101  # nobody gathers without
        began, number = self._clock(), self._closed + 1
        exchange.close(self._rounds.directory, number, self._first.model, gathering, self._rounds.outer)
        self._closed = number
        self._arrived = {}
        self._emit(Event("round", self._first.stage, data={
            "round": number, "rounds": len(self._rounds.at), "members": list(gathering.members), "late": list(gathering.late),
            "seconds": round(self._clock() - began, 3)}))
