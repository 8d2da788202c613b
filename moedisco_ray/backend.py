"""The backend protocol: the pipeline runs its work on a Ray cluster or in this process, with the same results."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from moedisco_ray.core.config import AnyPool, Lora, Optimizer, Pool, RunConfig
from moedisco_ray.core.errors import PoolError
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.models import read_config
from moedisco_ray.plan.memory import GIB, Exchange
from moedisco_ray.plan.streamed_way import model_memory
from moedisco_ray.policies.placement import Need, NodeType, fits_nowhere, place
from moedisco_ray.policies.quorum import Contribution, Quorum
from moedisco_ray.training import TrainJob, TrainResult

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Placement:
    """The pool on which a training runs, and its number of workers.

    Attributes:
        pool: Pool whose slots the workers hold; it may stand for one node type of a mixed pool.
        workers: Number of workers per training: 1, or the size of a gang, whose workers start together.
        max_failures: Maximum number of times that a training is restarted after one of its workers failed.
    """

    pool: Pool
    workers: int
    max_failures: int

    def on(self, pool: Pool) -> Placement:
        """A copy of this placement with another pool, such as one of the node types of a mixed pool."""
        return dataclasses.replace(self, pool=pool)

    def need(self, job: TrainJob) -> Need:
        """Peak memory that one worker needs for a job, and the owner of its text."""
        found = self.need_of(job.name, job.model, job.optimizer, job.sequence_length, job.exchange, lora=job.lora)
        return dataclasses.replace(found, owner=job.owner)

    def need_of(
        self,
        name: str,
        model: Path,
        optimizer: Optimizer,
        sequence_length: int,
        exchange: Exchange = "micro_batch",
        *,
        lora: Lora | None = None,
    ) -> Need:
        """Peak memory that one worker needs to train a model; 0 in a pool of one node type, which leaves no choice."""
        if not self.pool.mixed:
            return Need(name, 0.0)
        memory = model_memory(
            self.pool.memory,
            model,
            read_config(model)["model_type"],
            optimizer,
            sequence_length=sequence_length,
            gpu=self.pool.gpu,
            workers=self.workers,
            exchange=exchange,
            lora=lora,
        )
        return Need(name, memory.total / GIB)

    def types(self, free: Mapping[str, int]) -> list[NodeType]:
        """The pool's node types, as `policies.placement` takes them.

        Args:
            free: Number of trainings that could start now, by node type key; 1 is assumed for a node type without an
                entry.
        """
        return [
            NodeType(
                each.key, each.memory_gb, each.price_per_hour, each.speed, free=free.get(each.key, 1), owner=each.owner
            )
            for each in self.pool.node_types
        ]

    def check(self, needs: Sequence[Need]) -> None:
        """Refuse trainings that would wait forever.

        Raises:
            PoolError: A training fits no node type of the pool.
        """
        types = self.types({})
        for need in needs:
            if fits_nowhere(need, types):
                raise PoolError(
                    f"pools.{self.pool.name}.types",
                    max(kind.memory_gb for kind in types),
                    f"{need.name} needs {need.memory_gb:.1f} GiB, more than any node type has; add a larger one, or "
                    "lower submodels.optimizer.micro_batch",
                )

    @property
    def bundle(self) -> dict[str, float]:
        """Ray resources of one worker: the pool's own resource, and a GPU if the pool has GPUs, for each of its slots.

        It includes no CPU, so that the pool's nodes need not offer one. An autoscaler then never starts such a node for
        a task that needs only a CPU.
        """
        slots = self.pool.slots
        return {self.pool.resource: slots, **({"GPU": self.pool.gpu * slots} if self.pool.gpu else {})}


def of_whole_moe(pool: AnyPool) -> AnyPool:
    """A pool for a training of the whole MoE: one worker that streams the weights holds all slots of the pool."""
    return pool.holding(pool.most_workers) if pool.memory == "streamed" else pool


@dataclasses.dataclass(frozen=True)
class Trained:
    """A training that has ended.

    Attributes:
        result: Result of the training loop; a partial result if a quorum did not wait for it.
        seconds: Wall-clock seconds during which workers were held.
        held: Worker-seconds to pay for, by node type key.
        contribution: What the merge uses of this training. Only for `finished` does the job's output directory exist.
        reason: A sentence for users that says why the training is not finished; None if it is finished.
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
        """Mean number of workers, over the time in which at least one was held."""
        return self.worker_seconds / self.seconds if self.seconds else 1.0


class Backend(Protocol):
    """Runs the work of the stages."""

    def build_corpus(self, config: RunConfig, directory: Path, emit: Emit) -> dict[str, Any]:
        """Build the corpus artifact in `directory`, and return its summary."""

    def build_clusters(
        self,
        config: RunConfig,
        *,
        corpus_dir: Path,
        model: Path,
        directory: Path,
        emit: Emit,
        stop: StopFile,
        store: RunStore,
    ) -> dict[str, Any]:
        """Build the cluster artifact in `directory`, and return its summary.

        A pool's workers that compute vectors are metered.
        """

    def call(
        self, pool: Pool | None, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a pure function on one worker of a pool, and meter the worker.

        If `pool` is None, use any node and meter nothing.

        Raises:
            RunStopped: The stop file appeared before the function started.
        """

    def call_without_slot(
        self, pool: Pool, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a pure function on one of a pool's nodes, unmetered. It holds no slot.

        Raises:
            RunStopped: The stop file appeared before the function started.
        """

    def reachable(self, emit: Emit) -> AbstractContextManager[Emit]:
        """Yield a version of `emit` that workers on any node can call until the block ends."""

    def train_all(
        self,
        jobs: Sequence[TrainJob],
        placement: Placement,
        directory: Path,
        emit: Emit,
        *,
        stop: StopFile = ...,
        quorum: Quorum = ...,
    ) -> list[Trained]:
        """Train all jobs, in parallel while slots are free. Jobs that the quorum does not wait for stay unfinished.

        Raises:
            RunStopped: The stop file appeared.
        """

    def train_gang(
        self, job: TrainJob, pool: AnyPool, max_failures: int, directory: Path, emit: Emit, *, stop: StopFile = ...
    ) -> Trained:
        """Train one job on all free workers of a pool, within the pool's minimum and maximum number of workers.

        Raises:
            RunStopped: The stop file appeared.
        """


def vectors_kind(config: RunConfig, model: Path, slots: Mapping[str, int]) -> Pool | None:
    """The node type whose workers compute document vectors; None if CPU tasks on any node compute them.

    Of the node types that can train the model, the cheapest one with slots now is chosen, or the cheapest if none has
    slots. If no node type can train the model, the one with the most memory is chosen.

    Args:
        config: Configuration of the run.
        model: Model whose hidden states are the vectors.
        slots: Number of slots now, by node type key; 1 is assumed for a node type without an entry.
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
    """Emit events that meter workers of a pool as held until the block ends; without a pool, emit nothing."""
    if pool is None:
        yield
        return
    hold = uuid.uuid4().hex[:12]
    emit(Event("workers_held", stage, data={"hold": hold, "pool": pool.key, "workers": workers}))
    try:
        yield
    finally:
        emit(Event("workers_released", stage, data={"hold": hold}))
