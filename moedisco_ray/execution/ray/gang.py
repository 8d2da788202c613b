"""The fine-tune as a gang: all its workers at once, as many as there are, fewer after a loss, more when more have come.

The driver waits for slots, not Ray Train: a gang that waits holds nothing, begins at the size that fits, and two runs on a pool
that holds one of them follow each other. A size that changes is a training that ends with a checkpoint and another that begins
from it; the global batch stays, so that the loss does up to rounding.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

from moedisco_ray.core.errors import DivergedError, TrainingError
from moedisco_ray.core.events import Event
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.execution.ray import histories
from moedisco_ray.execution.ray.event_mailbox import UnitStatus
from moedisco_ray.execution.ray.wait_notice import WaitNotice
from moedisco_ray.policies.checkpointing import loss_rate
from moedisco_ray.policies.gang import Sizes, worth_growing
from moedisco_ray.policies.retrying import End, GiveUp
from moedisco_ray.training import TrainJob, TrainResult

_LOOK_SECONDS = 1.0
"""Between two looks at the pool."""
_ASSUMED_RESTART = 30.0
"""Seconds from stopping with a checkpoint to the next step, until that is measured."""

Outcome = TrainResult | End


class GangCluster(Protocol):
    """What a gang asks of the cluster that it is on."""

    @property
    def free(self) -> int:
        """Slots that could be had now."""

    @property
    def boot(self) -> float:
        """Seconds from asking for more nodes to having them; infinite where nothing brings any."""

    @property
    def most(self) -> float:
        """Slots that there may ever be."""

    @property
    def whereabouts(self) -> UnitStatus:
        """Where the gang was last seen."""

    @property
    def worker_hours(self) -> float:
        """For which its workers were held, summed over them."""

    def ask(self, workers: int) -> None:
        """Ask for the nodes of so many more workers, in place of what was asked for before."""

    def attempt(self, job: TrainJob, workers: int, stop: StopFile) -> Outcome:
        """Train by so many workers, until the job is finished, the file is there, or they end."""

    def note(self) -> None:
        """Keep for a later driver what was held so far, also by the attempt that is under way."""

    def tell(self, event: Event) -> None:
        """Hand an event to whoever listens."""

    def check(self) -> None:
        """Raise what went wrong with handing events on."""

    def missing(self, workers: int) -> str:
        """For people: what a gang of so many workers waits for."""


class Gang:
    """One training by a number of workers that may change.

    Args:
        job: The training.
        sizes: Which numbers they may be.
        max_failures: How often workers that failed are started again.
        cluster: Where.
        directory: For the files that ask an attempt to end; all nodes must see it.
        stop: Asks the whole run to end.
        clock: Seconds.
        look: Seconds between two looks.
    """

    def __init__(
        self, job: TrainJob, sizes: Sizes, max_failures: int, cluster: GangCluster, directory: Path, stop: StopFile = NEVER,
        clock: Callable[[], float] = time.monotonic, look: float = _LOOK_SECONDS,
    ) -> None:
        self._job = job
        self._sizes = sizes
        self._max_failures = max_failures
        self._cluster = cluster
        self._directory = directory
        self._stop = stop
        self._clock = clock
        self._look = look
        self._restart = _ASSUMED_RESTART
        self._history = histories.remembered(job, sizes.fewest)
        self._losses = 0
        self._asked_at: float | None = None
        self._standstill = WaitNotice(cluster.tell, clock)

    def train(self) -> TrainResult:
        """Until it is finished.

        Raises:
            MoeDiscoError: What another attempt could not mend.
            TrainingError: Its workers died more often than allowed, or it is poisoned.
            RunStopped: Somebody asked the run to end.
            OSError: An event could not be written.
        """
        larger: int | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="gang") as thread:
            while True:
                # One that ended to become larger waits for just that: the slots that it left are not known to be free yet.
                workers = larger or self._slots()
                end = StopFile(self._directory / f"end-{uuid.uuid4().hex}")
                before = self._cluster.whereabouts
                losses_per_hour = loss_rate(self._losses, self._cluster.worker_hours)
                job = histories.adjusted(self._job, self._history, losses_per_hour)
                running = thread.submit(self._cluster.attempt, job, workers, end)
                try:
                    larger = self._watch(running, workers, before, end)
                finally:
                    # Whatever ends the watch ends the workers, with a checkpoint, before the executor waits for them.
                    end.request("ended")
                outcome = running.result()
                if isinstance(outcome, End):
                    self._follow(outcome, workers)
                    larger = None
                elif outcome.finished:
                    return outcome
                self._stop.check()

    def _slots(self) -> int:
        """Wait until there is room for a gang; hold nothing meanwhile."""
        while (workers := self._sizes.on(self._cluster.free)) is None:
            self._stop.check()
            self._cluster.check()
            self._ask(self._next())
            self._standstill.waits(lambda: self._cluster.missing(self._sizes.fewest))
            time.sleep(self._look)
        self._standstill.goes_on()
        self._ask(0)
        return workers

    def _watch(self, running: Future[Outcome], workers: int, before: UnitStatus, end: StopFile) -> int | None:
        """Wait for an attempt to end, and end it once a larger one would be quicker; returns the size of that."""
        began = self._clock()
        under_way = False
        while not wait([running], timeout=self._look).done:
            self._stop.check()
            self._cluster.check()
            self._cluster.note()
            where = self._cluster.whereabouts
            # Until the attempt begins, the cluster knows of the one before it alone.
            if where.step_seconds is None or not where.step or (where == before and not under_way):
                continue
            if not under_way:
                under_way, self._restart = True, self._clock() - began
            larger = self._larger(workers, (self._job.steps - where.step) * where.step_seconds)
            if larger is not None:
                self._ask(0)
                self._cluster.tell(Event("worker_restarted", self._job.stage, self._job.name, {
                    "kind": "grown", "step": where.step, "reason": f"it goes on with {larger} workers in place of {workers}"}))
                end.request("grows")
                wait([running])
                return larger
        return None

    def _larger(self, workers: int, seconds_left: float) -> int | None:
        """The size that is worth a restart now; asks for nodes where that of more would be."""
        possible = self._sizes.on(workers + self._cluster.free)
        if possible is not None and worth_growing(workers, possible, seconds_left, self._restart):
            return possible
        # While the nodes boot, the gang trains on: what is left when they come is what they can shorten.
        booting = self._cluster.boot if self._asked_at is None else 0.0
        larger = self._next()
        self._ask(larger - workers if worth_growing(workers, larger, seconds_left - booting, self._restart) else 0)
        return None

    def _next(self) -> int:
        """The gang to ask for: the largest, and smaller ones where that does not come within twice the time it should take."""
        patience = 2 * self._cluster.boot
        waited = 0.0 if self._asked_at is None else self._clock() - self._asked_at
        return self._sizes.asked(self._cluster.most, int(waited // patience) if math.isfinite(patience) else 0)

    def _ask(self, workers: int) -> None:
        if not workers:
            self._asked_at = None
        elif self._asked_at is None:
            self._asked_at = self._clock()
        self._cluster.ask(workers)

    def _follow(self, end: End, workers: int) -> None:
        """Do what the policy says of an end of so many workers."""
        self._losses += end.costly
        decision = histories.follow(self._job, self._history, end, self._max_failures, workers)
        if isinstance(decision, GiveUp):
            raise (DivergedError if decision.poisoned else TrainingError)(f"{self._job.name}: {decision.reason}")
        self._history = decision.history
        self._cluster.tell(Event("worker_restarted", self._job.stage, self._job.name, {
            "kind": end.kind, "step": end.step, "reason": end.reason}))
