"""Sync points of sub-models that train in a queue."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray
from ray.actor import ActorHandle

from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.execution.ray.event_mailbox import EventMailbox, RunMailbox
from moedisco_ray.policies.sync_points import Arrival, SyncProgress, Turn
from moedisco_ray.training import SyncCoordinator, TrainJob

_STAY_SECONDS = 120.0
"""Seconds for which a sub-model keeps its slot while it waits at a sync point: several times the duration of its
restart."""
_WATCH_SECONDS = 1.0
"""Time for which a sync point is watched at each poll of the queue (s)."""
_LOOK_SECONDS = 0.1
"""Seconds between two messages to the board while a sync point is watched."""


class MailboxBoard:
    """The board of sync points in a run's mailbox actor; see `execution.sync_board`. Calls wait for the answer.

    Args:
        call: Calls a method of the board, by its name.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    @classmethod
    def of_member(cls, handle: ActorHandle) -> MailboxBoard:
        """The board for a member, from the mailbox actor."""
        return cls(lambda method, *arguments: ray.get(handle.sync.remote(method, *arguments)))

    @classmethod
    def of_driver(cls, mailbox: RunMailbox) -> MailboxBoard:
        """The board for the coordinator, which must not act once another driver coordinates."""
        return cls(functools.partial(mailbox.call, "sync"))

    def begin(self, completed: int) -> None:
        self._call("begin", completed)

    def open(self, ranges: int) -> None:
        self._call("open", ranges)

    def arrive(self, arrival: Arrival) -> None:
        self._call("arrive", arrival)

    def turn(self, name: str, number: int) -> Turn:
        found: Turn = self._call("turn", name, number)
        return found

    def finish(self, number: int, place: int, files: Mapping[str, Entry]) -> None:
        self._call("finish", number, place, files)

    def progress(self) -> SyncProgress:
        found: SyncProgress = self._call("progress")
        return found

    def arrivals(self) -> dict[str, Arrival]:
        found: dict[str, Arrival] = self._call("arrivals")
        return found

    def files(self) -> dict[str, Entry]:
        found: dict[str, Entry] = self._call("files")
        return found


class SyncThread:
    """Records and completes sync points in a thread of the driver, so that the queue can serve trainings meanwhile.

    Args:
        jobs: Trainings of the sub-models that sync.
        threads: Executor with one free thread.
        mailbox: The run's mailbox, which has the board and receives the events of the sync points.
    """

    def __init__(self, jobs: Sequence[TrainJob], threads: ThreadPoolExecutor, mailbox: EventMailbox) -> None:
        self._coordinator = SyncCoordinator(jobs, MailboxBoard.of_driver(mailbox.mailbox), mailbox.push)
        self._threads = threads
        self.pending: list[Future[None]] = []

    def startable(self, job: TrainJob) -> bool:
        """Whether a job without a slot has something to do: steps before its next sync point, or ranges to combine."""
        return not self._coordinator.is_waiting(job.name)

    def with_stay(self, job: TrainJob, *, slot_for_each: bool) -> TrainJob:
        """A copy of the job that keeps its slot while it waits at a sync point, if each sub-model has a slot."""
        if job.sync is None:
            return job
        return dataclasses.replace(
            job, sync=dataclasses.replace(job.sync, max_wait=_STAY_SECONDS if slot_for_each else 0.0)
        )

    def poll(self) -> None:
        """Watch the next sync point: record its members and complete it, once it is time.

        Raises:
            DamagedError: A record of the sync point is damaged.
            RunDirError: The disk is full.
        """
        for future in self.pending:
            if not future.done():
                return
            future.result()
        self.pending = [] if self._coordinator.is_over else [self._threads.submit(self._watch)]

    def drop(self, job: TrainJob) -> None:
        """Stop waiting for a job at sync points, because it was given up."""
        self._coordinator.remove(job.name)

    def _watch(self) -> None:
        """Return once something was done, or after a while."""
        ends = time.monotonic() + _WATCH_SECONDS
        while not self._coordinator.advance() and time.monotonic() < ends:
            time.sleep(_LOOK_SECONDS)
