"""The pipeline's work without Ray, for tests and to measure what Ray adds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from moedisco_ray import corpus
from moedisco_ray.cluster_packing import pack_cluster
from moedisco_ray.clustering import stage
from moedisco_ray.config import Pool, RunConfig
from moedisco_ray.events import Emit
from moedisco_ray.shell import Placement, Trained, holding
from moedisco_ray.stopping import NEVER, StopFile
from moedisco_ray.training import TrainJob, World, train

P = ParamSpec("P")
T = TypeVar("T")


class InProcess:
    """A `shell.Shell` that does one thing after the other, each with one worker."""

    def build_corpus(self, config: RunConfig, directory: Path) -> dict[str, Any]:
        """Make the corpus here."""
        return corpus.build(config, directory)

    def build_clusters(self, config: RunConfig, corpus_dir: Path, model: Path, directory: Path) -> dict[str, Any]:
        """Make the clusters here."""
        pack = functools.partial(pack_cluster, tokenizer=corpus_dir / "tokenizer")
        return stage.build_clusters(config, corpus_dir, model, directory, stage.LocalWorkers(pack))

    def call(self, pool: Pool | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it here."""
        del pool
        return function(*args, **kwargs)

    def train_all(
        self, jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit, stop: StopFile = NEVER,
    ) -> list[Trained]:
        """Train here, in order, each job by one worker."""
        del directory
        trained = []
        for job in jobs:
            started = time.monotonic()
            with holding(emit, placement.pool, 1, job.stage):
                result = train(job, World(), emit, lambda: stop.requested)
            if not result.finished:
                stop.check()
            seconds = time.monotonic() - started
            trained.append(Trained(result, seconds, seconds))
        return trained
