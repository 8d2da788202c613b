"""The interface that the stages use to run work somewhere: on a Ray cluster (`execution.ray.backend`) or in this process.

The results are the same.
"""

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
        pool: Pool (or node type) of the workers' slots.
        workers: Workers per trainer: 1, or the size of a gang, whose workers start together.
        max_failures: How often a worker that died is restarted.
    """

    pool: Pool
    workers: int
    max_failures: int

    def on(self, pool: Pool) -> Placement:
        """The placement on one of the pool's node types."""
        return dataclasses.replace(self, pool=pool)

    def need(self, job: TrainJob) -> Need:
        """Planned peak memory of one of a job's workers; nothing, where all machines are alike."""
        return self.need_of(job.name, job.model, job.optimizer, job.sequence_length)

    def need_of(self, name: str, model: Path, optimizer: Optimizer, sequence_length: int) -> Need:
        """Memory that one worker needs to train the model."""
        if not self.pool.mixed:
            return Need(name, 0.0)
        memory = model_memory(
            model, read_config(model)["model_type"], optimizer, sequence_length=sequence_length, gpu=self.pool.gpu,
            workers=self.workers)
        return Need(name, memory.total / GIB)

    def types(self, free: Mapping[str, int]) -> list[NodeType]:
        """The pool's node types, for `policies.placement`.

        Args:
            free: Trainers that could start now, by node type key; 1 for those left out.
        """
        return [
            NodeType(each.key, each.memory_gb, each.price_per_hour, each.speed, free.get(each.key, 1)) for each in self.pool.kinds]

    def check(self, needs: Sequence[Need]) -> None:
        """Check that every job fits a node type.

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
        """Resources of one worker: the pool's tag, and a GPU if the pool has GPUs.

        No CPU: so nodes may offer none, and work on text, which requests CPUs, does not make an autoscaler start them.
        """
        return {self.pool.resource: 1, **({"GPU": self.pool.gpu} if self.pool.gpu else {})}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A training that has ended.

    Attributes:
        result: Result of the loop; a partial result if a quorum did not wait for it.
        seconds: Wall-clock time for which the workers were held.
        held: Worker-seconds held, which are paid for, by pool key.
        contribution: What the training gives to the merge. Only a finished one has written the job's output.
        reason: Why it is not finished, as a message.
    """

    result: TrainResult
    seconds: float
    held: Mapping[str, float]
    contribution: Contribution = "finished"
    reason: str | None = None

    @property
    def worker_seconds(self) -> float:
        """Worker-seconds held, over all node types."""
        return sum(self.held.values())

    @property
    def workers(self) -> float:
        """Mean number of workers while there were any."""
        return self.worker_seconds / self.seconds if self.seconds else 1.0


class Backend(Protocol):
    """Runs work somewhere."""

    def build_corpus(self, config: RunConfig, directory: Path) -> dict[str, Any]:
        """Build the corpus artifact; returns its figures."""

    def build_clusters(
        self, config: RunConfig, *, corpus_dir: Path, model: Path, directory: Path, emit: Emit, stop: StopFile,
    ) -> dict[str, Any]:
        """Build the cluster artifact; returns its figures. Metered where workers of a pool compute the vectors."""

    def call(
        self, pool: Pool | None, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs,
    ) -> T:
        """Call a pure function on one worker of a pool, metered; None: on any machine, unmetered.

        Raises `RunStopped` if the run was asked to end before the function begins.
        """

    def train_all(
        self, jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit, *, stop: StopFile = ...,
        quorum: Quorum = ...,
    ) -> list[Trained]:
        """Train every job, as many at once as there is room for; jobs that the quorum does not wait for stay unfinished.

        Raises `RunStopped` once the run was asked to end.
        """

    def train_gang(
        self, job: TrainJob, pool: AnyPool, max_failures: int, directory: Path, emit: Emit, *, stop: StopFile = ...,
    ) -> Trained:
        """Train a job with as many workers as the pool has, within its bounds; raises `RunStopped` when the run must end."""


def vectors_kind(config: RunConfig, model: Path, slots: Mapping[str, int]) -> Pool | None:
    """The node type whose workers compute the vectors of documents; None: the CPUs of any machine.

    The cheapest node type that could train the model, first among those with slots; if none could, the largest.

    Args:
        config: The run's configuration.
        model: The model whose hidden states are the vectors.
        slots: Slots by node type key; 1 for those left out.
    """
    pool = config.vectors_pool
    if pool is None:
        return None
    placement = Placement(pool, 1, 0)
    need = placement.need_of("vectors", model, config.submodels.optimizer, config.corpus.sequence_length)
    types = placement.types({})
    found = place(need, placement.types(slots)) or place(need, types) or max(types, key=lambda each: each.memory_gb)
    return next(each for each in pool.kinds if each.key == found.name)


@contextlib.contextmanager
def holding(emit: Emit, pool: Pool | None, workers: int, stage: str | None = None) -> Iterator[None]:
    """Emit events for the meter: workers of a pool are held inside the block. Without a pool, emit none."""
    if pool is None:
        yield
        return
    hold = uuid.uuid4().hex[:12]
    emit(Event("workers_held", stage, data={"hold": hold, "pool": pool.key, "workers": workers}))
    try:
        yield
    finally:
        emit(Event("workers_released", stage, data={"hold": hold}))
