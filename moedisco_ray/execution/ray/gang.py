"""The fine-tune as a gang: all its workers start together; fewer after a lost node, more when more slots are free.

The driver waits for slots, not Ray Train. So a waiting gang holds nothing and begins at the size that fits, and if a pool has room
for one of two runs, they take turns. To change its size, a training ends with a checkpoint and another begins from it. The global
batch stays the same, and with it the loss, up to rounding.
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

_POLL_SECONDS = 1.0
"""Interval between two checks of the pool (s)."""
_ASSUMED_RESTART_SECONDS = 30.0
"""Assumed time from stopping with a checkpoint to the next step, until one was measured (s)."""

Outcome = TrainResult | End


class GangCluster(Protocol):
    """The interface to the Ray cluster that a gang needs."""

    @property
    def free_slots(self) -> int:
        """Slots that could be taken now."""

    @property
    def boot_seconds(self) -> float:
        """Expected seconds from requesting nodes to having them; infinite without an autoscaler."""

    @property
    def max_slots(self) -> float:
        """Maximum number of slots that the Ray cluster may have."""

    @property
    def status(self) -> UnitStatus:
        """Last known state of the gang."""

    @property
    def worker_hours(self) -> float:
        """Worker-hours held so far, over all attempts."""

    def request(self, workers: int) -> None:
        """Request nodes for this many additional workers, in place of the previous request."""

    def attempt(self, job: TrainJob, workers: int, stop: StopFile) -> Outcome:
        """Train with this many workers until the job is finished, the stop file exists, or the workers end."""

    def save_held(self) -> None:
        """Save, for a later driver, the worker-seconds held so far, including those of the running attempt."""

    def emit(self, event: Event) -> None:
        """Emit an event."""

    def check(self) -> None:
        """Raise the error that stopped the forwarding of events, if there is one."""

    def wait_message(self, workers: int) -> str:
        """A sentence about what a gang with this number of workers waits for."""


class Gang:
    """One training whose number of workers may change.

    Args:
        sizes: Allowed numbers of workers.
        max_failures: Maximum number of restarts of failed workers.
        directory: Directory of the files that end an attempt; all nodes must see it.
        stop: Ends the whole run.
        poll_seconds: Interval between two checks of the pool.
    """

    def __init__(
        self, job: TrainJob, sizes: Sizes, cluster: GangCluster, *, max_failures: int, directory: Path, stop: StopFile = NEVER,
        clock: Callable[[], float] = time.monotonic, poll_seconds: float = _POLL_SECONDS,
    ) -> None:
        self._job = job
        self._sizes = sizes
        self._cluster = cluster
        self._max_failures = max_failures
        self._directory = directory
        self._stop = stop
        self._clock = clock
        self._poll_seconds = poll_seconds
        self._restart_seconds = _ASSUMED_RESTART_SECONDS
        self._history = histories.remembered(job, sizes.fewest)
        self._losses = 0
        self._requested_at: float | None = None
        self._wait_notice = WaitNotice(cluster.emit, clock)

    def train(self) -> TrainResult:
        """Train until the job is finished.

        Raises:
            MoeDiscoError: An error that another attempt cannot repair.
            TrainingError: The workers failed too often, or the training diverged.
            RunStopped: The run was asked to end.
            OSError: An event could not be written.
        """
        larger: int | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="gang") as thread:
            while True:
                # After an attempt that ended to grow, start at the larger size: its old slots may not be reported as free yet.
                workers = larger or self._wait_for_slots()
                end = StopFile(self._directory / f"end-{uuid.uuid4().hex}")
                before = self._cluster.status
                losses_per_hour = loss_rate(self._losses, self._cluster.worker_hours)
                job = histories.adjusted(self._job, self._history, losses_per_hour)
                running = thread.submit(self._cluster.attempt, job, workers, end)
                try:
                    larger = self._watch(running, workers, before, end)
                finally:
                    # However the watch ends, stop the workers with a checkpoint before the executor waits for them.
                    end.request("ended")
                outcome = running.result()
                if isinstance(outcome, End):
                    self._handle_end(outcome, workers)
                    larger = None
                elif outcome.finished:
                    return outcome
                self._stop.check()

    def _wait_for_slots(self) -> int:
        """Wait, without holding anything, until a gang fits; returns its size."""
        while (workers := self._sizes.on(self._cluster.free_slots)) is None:
            self._stop.check()
            self._cluster.check()
            self._request(self._next_size())
            self._wait_notice.waiting(lambda: self._cluster.wait_message(self._sizes.fewest))
            time.sleep(self._poll_seconds)
        self._wait_notice.reset()
        self._request(0)
        return workers

    def _watch(self, running: Future[Outcome], workers: int, before: UnitStatus, end: StopFile) -> int | None:
        """Wait for an attempt to end, or stop it if a larger gang would finish sooner; returns the larger size."""
        began = self._clock()
        stepping = False
        while not wait([running], timeout=self._poll_seconds).done:
            self._stop.check()
            self._cluster.check()
            self._cluster.save_held()
            status = self._cluster.status
            # Until the attempt reports, the status is that of the previous attempt.
            if status.step_seconds is None or not status.step or (status == before and not stepping):
                continue
            if not stepping:
                stepping, self._restart_seconds = True, self._clock() - began
            larger = self._larger_size(workers, (self._job.steps - status.step) * status.step_seconds)
            if larger is not None:
                self._request(0)
                self._cluster.emit(Event("worker_restarted", self._job.stage, self._job.name, {
                    "kind": "grown", "step": status.step, "reason": f"it continues with {larger} workers in place of {workers}"}))
                end.request("grows")
                wait([running])
                return larger
        return None

    def _larger_size(self, workers: int, seconds_left: float) -> int | None:
        """A larger size that is worth a restart now. If one would be worth it but lacks free slots, request its nodes."""
        possible = self._sizes.on(workers + self._cluster.free_slots)
        if possible is not None and worth_growing(workers, possible, seconds_left, self._restart_seconds):
            return possible
        # The gang trains while the nodes boot: the nodes can shorten only the work that is left when they come.
        booting = self._cluster.boot_seconds if self._requested_at is None else 0.0
        larger = self._next_size()
        grow = worth_growing(workers, larger, seconds_left - booting, self._restart_seconds)
        self._request(larger - workers if grow else 0)
        return None

    def _next_size(self) -> int:
        """The size to request: the largest, or a smaller one if its nodes do not come within twice the expected time."""
        patience = 2 * self._cluster.boot_seconds
        waited = 0.0 if self._requested_at is None else self._clock() - self._requested_at
        return self._sizes.asked(self._cluster.max_slots, int(waited // patience) if math.isfinite(patience) else 0)

    def _request(self, workers: int) -> None:
        if not workers:
            self._requested_at = None
        elif self._requested_at is None:
            self._requested_at = self._clock()
        self._cluster.request(workers)

    def _handle_end(self, end: End, workers: int) -> None:
        self._losses += end.costly
        decision = histories.follow(self._job, self._history, end, self._max_failures, workers)
        if isinstance(decision, GiveUp):
            raise (DivergedError if decision.diverged else TrainingError)(f"{self._job.name}: {decision.reason}")
        self._history = decision.history
        self._cluster.emit(Event("worker_restarted", self._job.stage, self._job.name, {
            "kind": end.kind, "step": end.step, "reason": end.reason}))
