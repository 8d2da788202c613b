"""The pipeline's work without Ray, for tests and to measure what Ray adds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from moedisco_ray.backend import Placement, Trained, holding, vectors_kind
from moedisco_ray.core.config import AnyPool, Pool, RunConfig
from moedisco_ray.core.events import Emit
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.policies.placement import place_all
from moedisco_ray.policies.quorum import ALL, Quorum
from moedisco_ray.stages import corpus
from moedisco_ray.stages.clustering.build import LocalWorkers, build_clusters
from moedisco_ray.stages.clustering.packing import pack_cluster
from moedisco_ray.training import SyncCoordinator, TrainJob, TrainResult, World, training

P = ParamSpec("P")
T = TypeVar("T")


class LocalBackend:
    """A `backend.Backend` that does one thing after the other, each with one worker."""

    def build_corpus(self, config: RunConfig, directory: Path) -> dict[str, Any]:
        """Make the corpus here."""
        return corpus.build(config, directory)

    def build_clusters(
        self, config: RunConfig, corpus_dir: Path, model: Path, directory: Path, emit: Emit, stop: StopFile,
    ) -> dict[str, Any]:
        """Make the clusters here."""
        stop.check()
        pack = functools.partial(pack_cluster, tokenizer=corpus_dir / "tokenizer")
        held = functools.partial(holding, emit, vectors_kind(config, model, {}), 1, "cluster")
        return build_clusters(config, corpus_dir, model, directory, LocalWorkers(pack, held))

    def call(
        self, pool: Pool | None, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs,
    ) -> T:
        """Call it here, at once."""
        stop.check()
        with holding(emit, pool, 1):
            return function(*args, **kwargs)

    def train_all(
        self, jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit, stop: StopFile = NEVER,
        quorum: Quorum = ALL,
    ) -> list[Trained]:
        """Train here, in order, each job by one worker; those that have rounds take turns, all in memory.

        Nothing is late here, so that a quorum waits for all.
        """
        del directory, quorum
        needs = {job.name: placement.need(job) for job in jobs}
        placement.check(list(needs.values()))
        pools = {kind.key: kind for kind in placement.pool.kinds}
        keys = [place_all([needs[job.name]], placement.types({}))[job.name] for job in jobs]
        keeper = SyncCoordinator(jobs, emit)
        seconds = [0.0] * len(jobs)
        works = [training(job, World(), emit, lambda: stop.requested) for job in jobs]
        results: dict[int, TrainResult] = {}
        while len(results) < len(jobs):
            for i, job in enumerate(jobs):
                if i in results:
                    continue
                started = time.monotonic()
                with holding(emit, pools[keys[i]], 1, job.stage):
                    result = _until_it_waits(works[i])
                seconds[i] += time.monotonic() - started
                if result is not None:
                    if not result.finished:
                        stop.check()
                    results[i] = result
            gathering = keeper.due()
            if gathering is not None:
                keeper.close(gathering)
        return [Trained(results[i], seconds[i], {keys[i]: seconds[i]}) for i in range(len(jobs))]

    def train_gang(
        self, job: TrainJob, pool: AnyPool, max_failures: int, directory: Path, emit: Emit, stop: StopFile = NEVER,
    ) -> Trained:
        """Train here, by one worker."""
        return self.train_all([job], Placement(pool, 1, max_failures), directory, emit, stop)[0]


def _until_it_waits(work: Generator[None, None, TrainResult]) -> TrainResult | None:
    """Go on with a training until it waits (None) or ends."""
    try:
        next(work)
    except StopIteration as end:
        result: TrainResult = end.value
        return result
    return None
