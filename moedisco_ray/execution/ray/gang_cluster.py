"""A gang on the connected Ray cluster."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.artifacts import read_json, write_json
from moedisco_ray.core.config import AnyPool
from moedisco_ray.core.events import Emit, Event
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.attempts import AttemptContext, attempt
from moedisco_ray.execution.ray.autoscaling.reservation import Reservation
from moedisco_ray.execution.ray.event_mailbox import UnitStatus, open_mailbox
from moedisco_ray.execution.ray.gang import Gang, Outcome
from moedisco_ray.policies.arrival import boot_seconds
from moedisco_ray.policies.checkpointing import HOUR
from moedisco_ray.policies.gang import Sizes
from moedisco_ray.training import TrainJob, TrainResult

_SAVE_SECONDS = 10.0
"""Interval between two saves of the held worker-seconds (s); a driver that dies loses those since its last save."""


class _RayGangCluster:
    """A `GangCluster` on the connected Ray cluster.

    Args:
        context: What the attempts share, except for the number of workers.
        name: Name of the training.
        reservation: Requests nodes.
        path: File that stores the held worker-seconds for later drivers.
    """

    def __init__(
        self, context: AttemptContext, name: str, reservation: Reservation, path: Path, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._context = context
        self._name = name
        self._reservation = reservation
        self._path = path
        kept: dict[str, Any] = read_json(path) if path.exists() else {"held": {}, "seconds": 0.0}
        self._held_before: dict[str, float] = kept["held"]
        self._seconds: float = kept["seconds"]
        self._clock = clock
        self._saved_at = clock()
        self._saving = threading.Lock()     # the attempt's thread also saves, when the attempt ends
        self._counted = sum(self._held_before.values())
        self._workers = 1
        self._autoscales = session.autoscales()

    @property
    def free_slots(self) -> int:
        # The slots that are reserved for the gang are free for it.
        return session.free_workers(self._context.placement.bundle) + self._reservation.held

    @property
    def boot_seconds(self) -> float:
        return boot_seconds(self._reservation.boot_times) if self._autoscales else float("inf")

    @property
    def max_slots(self) -> float:
        return session.max_slots(self._context.placement.pool)

    @property
    def status(self) -> UnitStatus:
        return self._context.mailbox.status(self._name)

    @property
    def worker_hours(self) -> float:
        return sum(self.held.values()) / HOUR

    def request(self, workers: int) -> None:
        if self._autoscales:
            self._reservation.request(workers)

    def attempt(self, job: TrainJob, workers: int, stop: StopFile) -> Outcome:
        self._workers = workers
        context = dataclasses.replace(
            self._context, placement=dataclasses.replace(self._context.placement, workers=workers),
            stop_files=(*self._context.stop_files, stop))
        try:
            return attempt(job, context)
        finally:
            self._save()

    def save_held(self) -> None:
        if self._clock() - self._saved_at >= _SAVE_SECONDS:
            self._save()

    def emit(self, event: Event) -> None:
        self._context.mailbox.push(event)

    def check(self) -> None:
        self._context.mailbox.check()

    def wait_message(self, workers: int) -> str:
        return session.wait_message([self._context.placement.bundle], workers, self.free_slots)

    @property
    def held(self) -> dict[str, float]:
        """Worker-seconds held so far, over all drivers, by pool key."""
        held = self._context.mailbox.held().get(self._name, {})
        return {key: self._held_before.get(key, 0.0) + held.get(key, 0.0) for key in self._held_before | held}

    def finish(self, job: TrainJob, result: TrainResult) -> Trained:
        """Emit the end of the training, and return its result with its worker-seconds."""
        trained = Trained(result, self._seconds, self.held)
        self.emit(Event("unit_finished", job.stage, job.name, {
            "steps": result.steps, "tokens": result.tokens, "loss": result.loss, "seconds": round(trained.seconds, 3),
            "restored_step": result.restored_step}))
        return trained

    def _save(self) -> None:
        with self._saving:
            self._saved_at = self._clock()
            held = self.held
            total = sum(held.values())
            self._seconds += (total - self._counted) / self._workers
            self._counted = total
            write_json(self._path, {"held": held, "seconds": self._seconds})


def train_gang(
    job: TrainJob, pool: AnyPool, max_failures: int, directory: Path, emit: Emit, *, stop: StopFile = NEVER, run: str = "run",
    reservation: Reservation | None = None,
) -> Trained:
    """Train a job with as many workers as a pool has, within its bounds.

    Args:
        job: The training.
        pool: The workers' pool, with the bounds on their number.
        max_failures: Maximum number of restarts of failed workers. Losing a machine or changing size is not a failure.
        directory: Directory of Ray Train's own state and of the files that end an attempt; all nodes must see it.
        emit: Receives the workers' events.
        stop: Ends the training, with a checkpoint.
        run: Prefix of the Ray Train runs' names.
        reservation: What an earlier stage has requested for the gang; None: nothing.

    Raises:
        MoeDiscoError: An error of this package, such as a full disk.
        OSError: An event could not be written.
        TrainingError: The workers failed too often, or the training diverged.
        RunStopped: The run was asked to end; the workers have saved a checkpoint and ended.
        KeyboardInterrupt: The user interrupted the run; the workers have ended as for `RunStopped`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(job.batch, pool.fewest_workers, pool.most_workers)
    placement = Placement(pool, sizes.fewest, max_failures)
    reservation = reservation or Reservation(pool, f"{run}-{job.name}-ahead")
    with open_mailbox(emit) as mailbox:
        context = AttemptContext(
            run=run, placement=placement, directory=directory, stop_files=(stop,), mailbox=mailbox)
        cluster = _RayGangCluster(context, job.name, reservation, directory / "gang.json")
        try:
            result = Gang(job, sizes, cluster, max_failures=max_failures, directory=directory, stop=stop).train()
        finally:
            reservation.request(0)
        return cluster.finish(job, result)
