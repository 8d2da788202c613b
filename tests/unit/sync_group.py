"""Members of sync points that train in one process, in any order, with a coordinator that may be made anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tiny_training import ignore, never

from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.sync_board import SyncBoard
from moedisco_ray.policies.sync_points import SyncMembers
from moedisco_ray.training import SyncCoordinator, TrainJob, TrainResult, World, train_in_turns


def leaving(job: TrainJob, **changes: float) -> TrainJob:
    """A member that leaves its slot while it waits for others."""
    assert job.sync is not None
    return dataclasses.replace(job, sync=dataclasses.replace(job.sync, max_wait=0.0, **changes))


class SyncGroup:
    """Members, their board and their coordinator; `now` is the coordinator's time in seconds."""

    def __init__(self, jobs: Sequence[TrainJob], emit: Callable[[Event], None] = ignore) -> None:
        self.jobs, self.emit, self.now = jobs, emit, 0.0
        self.restart()

    def restart(self) -> None:
        """Lose the driver, with the board, and start a new one."""
        self.board = SyncBoard(lambda: self.now)
        self.coordinator = SyncCoordinator(self.jobs, self.board, self.emit, lambda: self.now)

    def run(self, job: TrainJob, stop: Callable[[], bool] = never) -> TrainResult:
        """Train a member until it ends or leaves; while it combines, the coordinator works and time passes."""
        steps = train_in_turns(leaving(job), World(), ignore, stop, board=self.board)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: TrainResult = end.value
                return result
            self.now += 1
            if self.board.progress().ranges:
                self.coordinator.advance()

    def record(self) -> SyncMembers:
        """Record the members of the next sync point, which have arrived."""
        assert self.coordinator.advance()
        assert self.coordinator._roster is not None
        roster = self.coordinator._roster
        return SyncMembers(tuple(each.name for each in roster.members), roster.late)

    def taken_in_turns(self, slots: int = 1) -> int:
        """Train all members on some slots, which waiting members leave; return how often one left it unfinished."""
        left, finished = 0, set[str]()
        while len(finished) < len(self.jobs):
            open_jobs = [job for job in self.jobs if job.name not in finished]
            for job in [job for job in open_jobs if not self.coordinator.is_waiting(job.name)][:slots]:
                result = self.run(job)
                assert result.finished is not result.waits_for_sync
                left += result.waits_for_sync
                finished |= {job.name} if result.finished else set()
            self.coordinator.advance()
        return left
