"""What the pipeline asks of whatever runs its work. `on_ray` answers on a cluster, `in_process` here; the results are the same."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from moedisco_ray.config import Pool, RunConfig
from moedisco_ray.events import Emit, Event
from moedisco_ray.stopping import StopFile
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

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one worker: its tag, and a GPU where the pool has them, else a core."""
        device = {"GPU": self.pool.gpu} if self.pool.gpu else {"CPU": 1}
        return {self.pool.resource: 1, **device}


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished trainer.

    Attributes:
        result: What the loop returned.
        seconds: Wall-clock time for which the workers were held.
        worker_seconds: The same, times their number: what is paid for.
    """

    result: TrainResult
    seconds: float
    worker_seconds: float


class Shell(Protocol):
    """Runs work somewhere."""

    def build_corpus(self, config: RunConfig, directory: Path) -> dict[str, Any]:
        """Make the corpus artifact; returns its figures."""

    def build_clusters(self, config: RunConfig, corpus_dir: Path, model: Path, directory: Path) -> dict[str, Any]:
        """Make the cluster artifact; returns its figures."""

    def call(self, pool: Pool | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """One pure function on one worker of a pool; None: anywhere."""

    def train_all(
        self, jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit, stop: StopFile = ...,
    ) -> list[Trained]:
        """Train every job, as many at once as there is room for; `RunStopped` once the stop file is there."""


@contextlib.contextmanager
def holding(emit: Emit, pool: Pool, workers: int, stage: str | None = None) -> Iterator[None]:
    """Tell the meter that workers of a pool are held inside the block."""
    hold = uuid.uuid4().hex[:12]
    emit(Event("workers_held", stage, data={"hold": hold, "pool": pool.kind, "workers": workers}))
    try:
        yield
    finally:
        emit(Event("workers_released", stage, data={"hold": hold}))
