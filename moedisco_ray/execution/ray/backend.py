from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import AnyPool, HighMemoryPool, Pool, RunConfig
from moedisco_ray.core.events import Emit, Event
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.autoscaling.reservation import Reservation
from moedisco_ray.execution.ray.clustering import build_clusters
from moedisco_ray.execution.ray.corpus import build_corpus
from moedisco_ray.execution.ray.gang_cluster import train_gang
from moedisco_ray.execution.ray.tasks import run_on
from moedisco_ray.execution.ray.trainers import Watch, train_all
from moedisco_ray.policies.arrival import ends_in
from moedisco_ray.policies.quorum import ALL, Quorum
from moedisco_ray.training import TrainJob

P = ParamSpec("P")
T = TypeVar("T")


class RayBackend:
    """A `backend.Backend` on the connected Ray cluster; what Ray shows of a run begins with the run's name."""

    def __init__(self, config: RunConfig) -> None:
        self._run = config.name
        self._high = config.pools.high_memory
        # Of slots that both pools share, some would be kept from the very work that is waited for.
        self._foresees = config.finetune_pool is self._high and self._high.resource not in config.pools.low_memory.tags
        self._ahead = Reservation(self._high, f"{config.name}-ahead")

    def build_corpus(self, config: RunConfig, directory: Path) -> dict[str, Any]:
        """Ray Data over the sources' files."""
        return build_corpus(config, directory)

    def build_clusters(
        self, config: RunConfig, corpus_dir: Path, model: Path, directory: Path, emit: Emit, stop: StopFile,
    ) -> dict[str, Any]:
        """Ray Data over the documents."""
        return build_clusters(config, corpus_dir, model, directory, emit, stop)

    def call(
        self, pool: Pool | None, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs,
    ) -> T:
        """A Ray task that holds a slot of the pool."""
        if not isinstance(pool, HighMemoryPool):
            return run_on(pool, emit, stop, function, *args, **kwargs)

        # The rest of the gang that is to come idles meanwhile, and would be let go, and asked for again. Asked for only once the
        # function holds its slot: two runs that each kept a part would wait for each other's.
        rest = max(0, self._ahead.workers - 1)

        def begun(event: Event) -> None:
            if event.type == "workers_held":
                self._ahead.note()
                self._ahead.ask(rest)
            emit(event)

        self._ahead.hand_over()
        return run_on(pool, begun, stop, function, *args, **kwargs)

    def train_all(
        self, jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit, stop: StopFile = NEVER,
        quorum: Quorum = ALL,
    ) -> list[Trained]:
        """A Ray Train run per job. While the last ones train, the nodes of what follows are asked for."""
        with contextlib.ExitStack() as failed:
            failed.callback(self._ahead.release)
            trained = train_all(jobs, placement, directory, emit, stop, quorum, self._run, self._watch(jobs[0].stage, emit))
            failed.pop_all()
        return trained

    def train_gang(
        self, job: TrainJob, pool: AnyPool, max_failures: int, directory: Path, emit: Emit, stop: StopFile = NEVER,
    ) -> Trained:
        """A Ray Train run after the other, each as large as there are slots."""
        self._ahead.hand_over()
        return train_gang(job, pool, max_failures, directory, emit, stop, self._run)

    def _watch(self, stage: str, emit: Emit) -> Watch | None:
        if stage != "submodels" or not self._foresees or not session.grows():
            return None
        pool = self._high
        # What can never be there together would not come at all.
        workers = max(pool.fewest_workers, int(min(pool.most_workers, session.most_ever(pool))))

        def watch(running: Sequence[float], waiting: Sequence[float], slots: int, stretch: float) -> None:
            advice = self._ahead.foresee(running, waiting, slots, workers, stretch)
            if advice == "ask":
                seconds = ends_in(running, waiting, slots, stretch)
                emit(Event("nodes_asked", stage, data={"pool": pool.key, "workers": workers, "seconds": round(seconds, 1)}))
            elif advice == "release":
                emit(Event("nodes_let_go", stage, data={"pool": pool.key}))

        return watch
