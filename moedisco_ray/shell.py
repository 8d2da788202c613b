"""What the pipeline asks of whatever runs its work. `on_ray` answers on a cluster, `InProcess` in this process, with the same results."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from moedisco_ray import corpus, tasks
from moedisco_ray.clustering import stage
from moedisco_ray.config import Pool, RunConfig
from moedisco_ray.events import Emit
from moedisco_ray.training import TrainJob, TrainResult, World, train

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

    def train_all(self, jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit) -> list[Trained]:
        """Train every job, as many at once as there is room for."""


class InProcess:
    """The same work without Ray: one thing after the other, one worker each. For tests, and to measure what Ray adds."""

    def build_corpus(self, config: RunConfig, directory: Path) -> dict[str, Any]:
        """Make the corpus here."""
        return corpus.build(config, directory)

    def build_clusters(self, config: RunConfig, corpus_dir: Path, model: Path, directory: Path) -> dict[str, Any]:
        """Make the clusters here."""
        pack = functools.partial(tasks.pack_cluster, tokenizer=corpus_dir / "tokenizer")
        return stage.build_clusters(config, corpus_dir, model, directory, stage.LocalWorkers(pack))

    def call(self, pool: Pool | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it here."""
        del pool
        return function(*args, **kwargs)

    def train_all(self, jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit) -> list[Trained]:
        """Train here, in order, each job by one worker."""
        del placement, directory
        trained = []
        for job in jobs:
            started = time.monotonic()
            result = train(job, World(), emit, lambda: False)
            seconds = time.monotonic() - started
            trained.append(Trained(result, seconds, seconds))
        return trained
