"""The keeper of rounds beside a queue of trainings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from moedisco_ray.core.events import Emit
from moedisco_ray.training import SyncCoordinator, TrainJob

_STAY_SECONDS = 120.0
"""For which a member keeps its slot while it waits: several times what a new start of it takes."""


class KeeperBeside:
    """Makes outer steps in a thread, so that the queue goes on hearing of what ends meanwhile.

    In this process, not in a Ray task: members that wait may hold every slot there is.

    Args:
        jobs: The members.
        threads: Of which one is free.
        emit: Receives the rounds' events.
    """

    def __init__(self, jobs: Sequence[TrainJob], threads: ThreadPoolExecutor, emit: Emit) -> None:
        self._keeper = SyncCoordinator(jobs, emit)
        self._threads = threads
        self.at_work: list[Future[None]] = []

    def startable(self, job: TrainJob) -> bool:
        """Whether there is something to do for a job that holds no slot."""
        return not self._keeper.waits(job.name)

    def seated(self, job: TrainJob, *, for_all: bool) -> TrainJob:
        """The job as it should wait for others: in its slot where there is one for each, since nobody else needs it."""
        if job.rounds is None:
            return job
        return dataclasses.replace(job, rounds=dataclasses.replace(job.rounds, stay=_STAY_SECONDS if for_all else 0.0))

    def look(self) -> None:
        """See to the open round.

        Raises:
            RunDirError: The disk is full.
        """
        for future in self.at_work:
            if not future.done():
                return
            future.result()
        gathering = self._keeper.due()
        self.at_work = [] if gathering is None else [self._threads.submit(self._keeper.close, gathering)]

    def drop(self, job: TrainJob) -> None:
        """A job was given up: no round waits for it any longer."""
        self._keeper.drop(job.name)
