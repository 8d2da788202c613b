"""A gang on the connected cluster."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.artifacts import read_json, write_json
from moedisco_ray.core.config import AnyPool
from moedisco_ray.core.events import Emit, Event
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.attempts import AttemptContext, attempt
from moedisco_ray.execution.ray.autoscaling.reservation import Reservation
from moedisco_ray.execution.ray.event_mailbox import UnitStatus, relay
from moedisco_ray.execution.ray.gang import Gang, Outcome
from moedisco_ray.policies.arrival import boot_seconds
from moedisco_ray.policies.checkpointing import HOUR
from moedisco_ray.policies.gang import Sizes
from moedisco_ray.training import TrainJob, TrainResult

_NOTE_SECONDS = 10.0
"""Between two notes of what was held; what a driver knew beyond the last one is lost with it."""


class RayGangCluster:
    """A `GangCluster` on the connected cluster.

    Args:
        around: Of every attempt; its placement's number of workers is that of none of them.
        name: Of the training.
        ahead: Asks for nodes.
        path: Where it is kept for later drivers what was held.
        clock: Seconds.
    """

    def __init__(
        self, around: AttemptContext, name: str, ahead: Reservation, path: Path, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._around = around
        self._name = name
        self._ahead = ahead
        self._path = path
        kept: dict[str, Any] = read_json(path) if path.exists() else {"held": {}, "seconds": 0.0}
        self._held_before: dict[str, float] = kept["held"]
        self._seconds: float = kept["seconds"]
        self._clock = clock
        self._noted = clock()
        self._noting = threading.Lock()     # an attempt's end is noted by its own thread
        self._counted = sum(self._held_before.values())
        self._workers = 1
        self._grows = session.grows()

    @property
    def free(self) -> int:
        """See `GangCluster`; what is reserved for it counts."""
        return session.free(self._around.placement.bundle) + self._ahead.held

    @property
    def boot(self) -> float:
        """See `GangCluster`."""
        return boot_seconds(self._ahead.boots) if self._grows else float("inf")

    @property
    def most(self) -> float:
        """See `GangCluster`."""
        return session.most_ever(self._around.placement.pool)

    @property
    def whereabouts(self) -> UnitStatus:
        """See `GangCluster`."""
        return self._around.mail.whereabouts(self._name)

    @property
    def worker_hours(self) -> float:
        """See `GangCluster`."""
        return sum(self.held.values()) / HOUR

    def ask(self, workers: int) -> None:
        """See `GangCluster`; without an autoscaler nobody would hear it."""
        if self._grows:
            self._ahead.ask(workers)

    def attempt(self, job: TrainJob, workers: int, stop: StopFile) -> Outcome:
        """See `GangCluster`."""
        self._workers = workers
        around = dataclasses.replace(
            self._around, placement=dataclasses.replace(self._around.placement, workers=workers),
            stops=(*self._around.stops, stop))
        try:
            return attempt(job, around)
        finally:
            self._note()

    def note(self) -> None:
        """See `GangCluster`; every few seconds, however often it is called."""
        if self._clock() - self._noted >= _NOTE_SECONDS:
            self._note()

    def tell(self, event: Event) -> None:
        """See `GangCluster`."""
        ray.get(self._around.mail.handle.push.remote(event))

    def check(self) -> None:
        """See `GangCluster`."""
        self._around.mail.check()

    def missing(self, workers: int) -> str:
        """See `GangCluster`."""
        return session.missing([self._around.placement.bundle], workers, self.free)

    @property
    def held(self) -> dict[str, float]:
        """Worker-seconds up to now, by what the meter calls the machines."""
        held = self._around.mail.held().get(self._name, {})
        return {key: self._held_before.get(key, 0.0) + held.get(key, 0.0) for key in self._held_before | held}

    def trained(self, job: TrainJob, result: TrainResult) -> Trained:
        """The training as it has ended, which is told."""
        trained = Trained(result, self._seconds, self.held)
        self.tell(Event("unit_finished", job.stage, job.name, {
            "steps": result.steps, "tokens": result.tokens, "loss": result.loss, "seconds": round(trained.seconds, 3),
            "restored_step": result.restored_step}))
        return trained

    def _note(self) -> None:
        with self._noting:
            self._noted = self._clock()
            held = self.held
            total = sum(held.values())
            self._seconds += (total - self._counted) / self._workers
            self._counted = total
            write_json(self._path, {"held": held, "seconds": self._seconds})


def train_gang(
    job: TrainJob, pool: AnyPool, max_failures: int, directory: Path, emit: Emit, stop: StopFile = NEVER, run: str = "run",
) -> Trained:
    """Train a job by as many workers of a pool as there are, within its bounds.

    Args:
        job: The training.
        pool: Whose workers; says how many they may be.
        max_failures: How often workers that failed are started again. Losing a machine, or changing size, is no failure.
        directory: For Ray Train's own state, and the files that end an attempt; all nodes must see it.
        emit: Receives the workers' events.
        stop: Asks the workers to end.
        run: Begins the names of the Ray Train runs.

    Raises:
        MoeDiscoError: An error that is ours, such as a full disk.
        OSError: An event could not be written.
        TrainingError: A worker died more often than allowed, or the training is poisoned.
        RunStopped: Somebody asked the run to end; the workers have saved a checkpoint and ended.
        KeyboardInterrupt: The same, from the keyboard.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(job.batch, pool.fewest_workers, pool.most_workers)
    placement = Placement(pool, sizes.fewest, max_failures)
    ahead = Reservation(pool, f"{run}-{job.name}-ahead")
    with relay(emit) as mail:
        around = AttemptContext(run, placement, directory, (stop,), mail, waits=False)
        cluster = RayGangCluster(around, job.name, ahead, directory / "gang.json")
        try:
            result = Gang(job, sizes, max_failures, cluster, directory, stop).train()
        finally:
            ahead.release()
        return cluster.trained(job, result)
