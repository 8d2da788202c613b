"""The backend protocol: the pipeline runs its work on a Ray cluster or in this process, with the same results."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
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
    """The pool and the number of workers of a training.

    Attributes:
        pool: Pool, or one of its node types, whose slots the workers hold.
        workers: Number of workers per training: 1, or the size of a gang, whose workers start together.
        max_failures: Maximum number of restarts after a worker failed.
    """

    pool: Pool
    workers: int
    max_failures: int

    def on(self, pool: Pool) -> Placement:
        """A copy of this placement on one of the pool's node types."""
        return dataclasses.replace(self, pool=pool)

    def need(self, job: TrainJob) -> Need:
        """Peak memory that one worker needs for a job."""
        return self.need_of(job.name, job.model, job.optimizer, job.sequence_length)

    def need_of(self, name: str, model: Path, optimizer: Optimizer, sequence_length: int) -> Need:
        """Peak memory that one worker needs to train a model; 0 if the pool has only one node type."""
        if not self.pool.mixed:
            return Need(name, 0.0)
        memory = model_memory(
            model, read_config(model)["model_type"], optimizer, sequence_length=sequence_length, gpu=self.pool.gpu,
            workers=self.workers)
        return Need(name, memory.total / GIB)

    def types(self, free: Mapping[str, int]) -> list[NodeType]:
        """The pool's node types, as `policies.placement` takes them.

        Args:
            free: Number of trainings that could start now, by node type key; a missing type counts as 1.
        """
        return [
            NodeType(each.key, each.memory_gb, each.price_per_hour, each.speed, free.get(each.key, 1))
            for each in self.pool.node_types]

    def check(self, needs: Sequence[Need]) -> None:
        """Refuse trainings that would wait forever.

        Raises:
            PoolError: A training fits no node type of the pool.
        """
        types = self.types({})
        for need in needs:
            if fits_nowhere(need, types):
                raise PoolError(
                    f"pools.{self.pool.name}.types", max(kind.memory_gb for kind in types),
                    f"{need.name} needs {need.memory_gb:.1f} GB, more than any node type has; add a larger one, or lower "
                    "submodels.optimizer.micro_batch")

    @property
    def bundle(self) -> dict[str, float]:
        """Ray resources of one worker: the pool's own resource, and a GPU if the pool has GPUs.

        It includes no CPU, so that the pool's nodes need not offer one. An autoscaler then never starts such a node for a task that
        needs only a CPU.
        """
        return {self.pool.resource: 1, **({"GPU": self.pool.gpu} if self.pool.gpu else {})}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A training that has ended.

    Attributes:
        result: Result of the training loop; a partial result if a quorum did not wait for it.
        seconds: Wall-clock time during which workers were held (s).
        held: Worker-seconds to pay for, by node type key.
        contribution: What the merge uses of this training. The job's output directory exists only if it is `finished`.
        reason: Why the training is not finished, in a sentence for users.
    """

    result: TrainResult
    seconds: float
    held: Mapping[str, float]
    contribution: Contribution = "finished"
    reason: str | None = None

    @property
    def worker_seconds(self) -> float:
        """Worker-seconds to pay for, over all node types."""
        return sum(self.held.values())

    @property
    def workers(self) -> float:
        """Mean number of workers while any were held."""
        return self.worker_seconds / self.seconds if self.seconds else 1.0


class Backend(Protocol):
    """Runs the work of the stages."""

    def build_corpus(self, config: RunConfig, directory: Path, emit: Emit) -> dict[str, Any]:
        """Build the corpus artifact and return its summary."""

    def build_clusters(
        self, config: RunConfig, *, corpus_dir: Path, model: Path, directory: Path, emit: Emit, stop: StopFile,
    ) -> dict[str, Any]:
        """Build the cluster artifact and return its summary; metered if workers of a pool compute the vectors."""

    def call(
        self, pool: Pool | None, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs,
    ) -> T:
        """Run a pure function on one worker of a pool, metered while it runs; without a pool, on any node and unmetered.

        Raises:
            RunStopped: The stop file appeared before the function started.
        """

    def reachable(self, emit: Emit) -> AbstractContextManager[Emit]:
        """Yield a version of `emit` that workers on any node can call until the block ends."""

    def train_all(
        self, jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit, *, stop: StopFile = ...,
        quorum: Quorum = ...,
    ) -> list[Trained]:
        """Train all jobs, in parallel where slots are free. Jobs that the quorum does not wait for stay unfinished.

        Raises:
            RunStopped: The stop file appeared.
        """

    def train_gang(
        self, job: TrainJob, pool: AnyPool, max_failures: int, directory: Path, emit: Emit, *, stop: StopFile = ...,
    ) -> Trained:
        """Train one job on all free workers of a pool, between the pool's minimum and maximum number.

        Raises:
            RunStopped: The stop file appeared.
        """


def vectors_kind(config: RunConfig, model: Path, slots: Mapping[str, int]) -> Pool | None:
    """The node type whose workers compute document vectors; None: the vectors are computed on any CPU.

    Of the types that can train the model, it is the cheapest one that has slots now, or else the cheapest. If no type can train the
    model, it is the largest.

    Args:
        config: Configuration of the run.
        model: Model whose hidden states are the vectors.
        slots: Number of slots now, by node type key; a missing type counts as 1.
    """
    pool = config.vectors_pool
    if pool is None:
        return None
    placement = Placement(pool, 1, 0)
    need = placement.need_of("vectors", model, config.submodels.optimizer, config.corpus.sequence_length)
    types = placement.types({})
    found = place(need, placement.types(slots)) or place(need, types) or max(types, key=lambda each: each.memory_gb)
    return next(each for each in pool.node_types if each.key == found.name)


@contextlib.contextmanager
def held_workers(emit: Emit, pool: Pool | None, workers: int, stage: str | None = None) -> Iterator[None]:
    """Meter this number of a pool's workers as held until the block ends; without a pool, do nothing."""
    if pool is None:
        yield
        return
    hold = uuid.uuid4().hex[:12]
    emit(Event("workers_held", stage, data={"hold": hold, "pool": pool.key, "workers": workers}))
    try:
        yield
    finally:
        emit(Event("workers_released", stage, data={"hold": hold}))
