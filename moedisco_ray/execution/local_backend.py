"""The backend that runs all work in this process, without Ray: for tests, and to measure the overhead of Ray."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from moedisco_ray.backend import Placement, Trained, held_workers, of_whole_moe, vectors_kind
from moedisco_ray.core.config import AnyPool, Pool, RunConfig
from moedisco_ray.core.records.events import Emit
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution.sync_board import SyncBoard
from moedisco_ray.policies.placement import place_all
from moedisco_ray.policies.quorum import ALL, Quorum
from moedisco_ray.stages import corpus
from moedisco_ray.stages.clustering.build import LocalWorkers, build_clusters
from moedisco_ray.stages.context import device_of
from moedisco_ray.training import (
    SyncCoordinator,
    TrainJob,
    TrainResult,
    World,
    arithmetic_of,
    devices_of,
    train_in_turns,
)

P = ParamSpec("P")
T = TypeVar("T")


class LocalBackend:
    """A `backend.Backend` that does everything in sequence, with one worker."""

    def build_corpus(self, config: RunConfig, directory: Path, emit: Emit) -> dict[str, Any]:
        return corpus.build(config, directory, events=corpus.counting(emit))

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
        stop.check()
        held = functools.partial(held_workers, emit, vectors_kind(config, model, {}), 1, "cluster")
        return build_clusters(config, corpus_dir, model, directory, LocalWorkers(held), emit=emit, store=store)

    def call(
        self, pool: Pool | None, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        stop.check()
        with held_workers(emit, pool, 1):
            return function(*args, **kwargs)

    def call_without_slot(
        self, pool: Pool, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        del pool, emit
        stop.check()
        return function(*args, **kwargs)

    def reachable(self, emit: Emit) -> contextlib.nullcontext[Emit]:
        """The same `emit`: everything runs in this process."""
        return contextlib.nullcontext(emit)

    def train_all(
        self,
        jobs: Sequence[TrainJob],
        placement: Placement,
        directory: Path,
        emit: Emit,
        *,
        stop: StopFile = NEVER,
        quorum: Quorum = ALL,
    ) -> list[Trained]:
        """Train the jobs in order, each with one worker; jobs with sync points take turns, all of them in memory.

        A quorum has no effect: no job is late here.
        """
        del directory, quorum
        needs = {job.name: placement.need(job) for job in jobs}
        placement.check(list(needs.values()))
        pools = {node_type.key: node_type for node_type in placement.pool.node_types}
        keys = [place_all([needs[job.name]], placement.types({}))[job.name] for job in jobs]
        board = SyncBoard()
        coordinator = SyncCoordinator(jobs, board, emit)
        seconds = [0.0] * len(jobs)
        device, slots = device_of(placement.pool), placement.pool.slots
        world = World(device=device, devices=devices_of(device, slots))
        trainings = [train_in_turns(job, world, emit, lambda: stop.requested, board=board) for job in jobs]
        results: dict[int, TrainResult] = {}
        while len(results) < len(jobs):
            for i, job in enumerate(jobs):
                if i in results:
                    continue
                started = time.monotonic()
                with held_workers(emit, pools[keys[i]], slots, job.stage), arithmetic_of(job, world):
                    result = _until_sync_point(trainings[i])
                seconds[i] += time.monotonic() - started
                if result is not None:
                    if not result.finished:
                        stop.check()
                    results[i] = result
            coordinator.advance()
        return [Trained(results[i], seconds[i], {keys[i]: slots * seconds[i]}) for i in range(len(jobs))]

    def train_gang(
        self, job: TrainJob, pool: AnyPool, max_failures: int, directory: Path, emit: Emit, *, stop: StopFile = NEVER
    ) -> Trained:
        """Train with one worker."""
        return self.train_all([job], Placement(of_whole_moe(pool), 1, max_failures), directory, emit, stop=stop)[0]


def _until_sync_point(work: Generator[float, None, TrainResult]) -> TrainResult | None:
    """Continue a training; return its result when it ends, or None when it waits at a sync point."""
    try:
        next(work)
    except StopIteration as end:
        result: TrainResult = end.value
        return result
    return None
