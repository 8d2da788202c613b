"""Sync points of sub-models that train in a queue."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from moedisco_ray.core.records.events import Emit
from moedisco_ray.training import SyncCoordinator, TrainJob

_STAY_SECONDS = 120.0
"""Seconds for which a sub-model keeps its slot while it waits at a sync point: several times the duration of its
restart."""


class SyncThread:
    """Takes the outer optimizer's steps in a thread of the driver, so that the queue can serve trainings meanwhile.

    A Ray task could not take them: the sub-models that wait at the sync point may hold every slot.

    Args:
        jobs: Trainings of the sub-models that sync.
        threads: Executor with one free thread.
        emit: Receives the events of the sync points.
    """

    def __init__(self, jobs: Sequence[TrainJob], threads: ThreadPoolExecutor, emit: Emit) -> None:
        self._coordinator = SyncCoordinator(jobs, emit)
        self._threads = threads
        self.pending: list[Future[None]] = []

    def startable(self, job: TrainJob) -> bool:
        """Whether a job without a slot has steps to make before its next sync point."""
        return not self._coordinator.is_waiting(job.name)

    def with_stay(self, job: TrainJob, *, slot_for_each: bool) -> TrainJob:
        """A copy of the job that keeps its slot while it waits at a sync point, if each sub-model has a slot."""
        if job.sync is None:
            return job
        return dataclasses.replace(
            job, sync=dataclasses.replace(job.sync, max_wait=_STAY_SECONDS if slot_for_each else 0.0)
        )

    def poll(self) -> None:
        """Start the outer step once all sub-models have arrived at the sync point, or the wait for late ones is over.

        Raises:
            RunDirError: The disk is full.
        """
        for future in self.pending:
            if not future.done():
                return
            future.result()
        members = self._coordinator.ready_members()
        self.pending = [] if members is None else [self._threads.submit(self._coordinator.combine, members)]

    def drop(self, job: TrainJob) -> None:
        """Stop waiting for a job at sync points, because it was given up."""
        self._coordinator.remove(job.name)
