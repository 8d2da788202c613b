"""What the pipeline asks of whatever runs its work. `on_ray` answers on a cluster, `in_process` here; the results are the same."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from moedisco_ray.core.config import AnyPool, Optimizer, Pool, RunConfig
from moedisco_ray.core.errors import PoolError
from moedisco_ray.core.events import Emit, Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.models import read_config
from moedisco_ray.plan.memory import GIB, model_memory
from moedisco_ray.policies.placement import Need, NodeType, fits_nowhere, place
from moedisco_ray.policies.quorum import Contribution, Quorum
from moedisco_ray.training import TrainJob, TrainResult

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where trainers run.

    Attributes:
        pool: The pool that their workers hold slots of.
        workers: Workers per trainer: 1, or the size of the gang, which starts as a whole or waits as a whole.
        max_failures: How often a worker that died is started again.
    """

    pool: Pool
    workers: int
    max_failures: int

    def on(self, pool: Pool) -> Placement:
        """The same on one of the pool's node types."""
        return dataclasses.replace(self, pool=pool)

    def need(self, job: TrainJob) -> Need:
        """What one of a job's workers holds at its peak, as the plan reckons; nothing, where machines are all alike."""
        return self.need_of(job.name, job.model, job.optimizer, job.sequence_length)

    def need_of(self, name: str, model: Path, optimizer: Optimizer, sequence_length: int) -> Need:
        """The same of whatever would train a model."""
        if not self.pool.mixed:
            return Need(name, 0.0)
        memory = model_memory(
            model, read_config(model)["model_type"], optimizer, sequence_length=sequence_length, gpu=self.pool.gpu,
            workers=self.workers)
        return Need(name, memory.total / GIB)

    def types(self, free: Mapping[str, int]) -> list[NodeType]:
        """The pool's node types as `policies.placement` sees them.

        Args:
            free: Trainers that could start now, by the type's key; of those left out, one.
        """
        return [
            NodeType(kind.key, kind.memory_gb, kind.price_per_hour, kind.speed, free.get(kind.key, 1)) for kind in self.pool.kinds]

    def check(self, needs: Sequence[Need]) -> None:
        """Refuse what would wait for ever.

        Raises:
            PoolError: A job fits no node type of the pool.
        """
        types = self.types({})
        for need in needs:
            if fits_nowhere(need, types):
                raise PoolError(
                    f"pools.{self.pool.kind}.types", max(kind.memory_gb for kind in types),
                    f"{need.name} needs {need.memory_gb:.1f} GB, more than any of them has; add a larger one, or lower "
                    "submodels.optimizer.micro_batch")

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one worker: its tag, and a GPU where the pool has them.

        No core: a node that offers none is one that work on text, which asks for cores, does not have an autoscaler start.
        """
        return {self.pool.resource: 1, **({"GPU": self.pool.gpu} if self.pool.gpu else {})}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trainer that has ended.

    Attributes:
        result: What the loop returned; of one that a quorum did not wait for, what it had come to.
        seconds: Wall-clock time for which the workers were held.
        held: The same times their number, by what the meter calls their machines: what is paid for.
        contribution: What the training gives to the merge. Unless it is finished, nothing is at the job's output yet.
        reason: Why it is not finished, for people.
    """

    result: TrainResult
    seconds: float
    held: Mapping[str, float]
    contribution: Contribution = "finished"
    reason: str | None = None

    @property
    def worker_seconds(self) -> float:
        """What is paid for, over all kinds of machines."""
        return sum(self.held.values())

    @property
    def workers(self) -> float:
        """How many there were, on average over the time for which there were any."""
        return self.worker_seconds / self.seconds if self.seconds else 1.0


class Backend(Protocol):
    """Runs work somewhere."""

    def build_corpus(self, config: RunConfig, directory: Path) -> dict[str, Any]:
        """Make the corpus artifact; returns its figures."""

    def build_clusters(
        self, config: RunConfig, corpus_dir: Path, model: Path, directory: Path, emit: Emit, stop: StopFile,
    ) -> dict[str, Any]:
        """Make the cluster artifact; returns its figures. Metered where workers of a pool make the vectors."""

    def call(
        self, pool: Pool | None, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs,
    ) -> T:
        """One pure function on one worker of a pool, metered while it runs; None: anywhere, unmetered.

        `RunStopped` if the stop file comes before the function begins.
        """

    def train_all(
        self, jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit, stop: StopFile = ...,
        quorum: Quorum = ...,
    ) -> list[Trained]:
        """Train every job, as many at once as there is room for; `RunStopped` once the stop file is there.

        Those that a quorum does not wait for are not finished.
        """

    def train_gang(
        self, job: TrainJob, pool: AnyPool, max_failures: int, directory: Path, emit: Emit, stop: StopFile = ...,
    ) -> Trained:
        """Train a job by all the workers of a pool that there are, within its bounds; `RunStopped` once the stop file is there."""


def vectors_kind(config: RunConfig, model: Path, slots: Mapping[str, int]) -> Pool | None:
    """The node type whose workers make vectors of documents; None: any machine's cores do.

    The cheapest that could train the model, of those that are there, or else of all; where none could, the largest.

    Args:
        config: The run's.
        model: Whose hidden states the vectors are.
        slots: How many there are, by the type's key; of those left out, one.
    """
    pool = config.vectors_pool
    if pool is None:
        return None
    placement = Placement(pool, 1, 0)
    need = placement.need_of("vectors", model, config.submodels.optimizer, config.corpus.sequence_length)
    types = placement.types({})
    kind = place(need, placement.types(slots)) or place(need, types) or max(types, key=lambda each: each.memory_gb)
    return next(each for each in pool.kinds if each.key == kind.name)


@contextlib.contextmanager
def holding(emit: Emit, pool: Pool | None, workers: int, stage: str | None = None) -> Iterator[None]:
    """Tell the meter that workers of a pool are held inside the block; of none, there is nothing to tell."""
    if pool is None:
        yield
        return
    hold = uuid.uuid4().hex[:12]
    emit(Event("workers_held", stage, data={"hold": hold, "pool": pool.key, "workers": workers}))
    try:
        yield
    finally:
        emit(Event("workers_released", stage, data={"hold": hold}))
