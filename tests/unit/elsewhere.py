"""A backend whose work runs in other processes, each with a cache of its own, as on machines that share nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any, Self

import torch
from gang_processes import processes

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Emit, StageProgress, discard
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_work import Files, on_files, unpickled
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.sync_board import SyncBoard
from moedisco_ray.policies.quorum import ALL, Quorum
from moedisco_ray.stages import corpus
from moedisco_ray.stages.clustering.build import build_clusters
from moedisco_ray.stages.clustering.store import embed_parts
from moedisco_ray.stages.tables import InProcess
from moedisco_ray.training import SyncCoordinator, TrainJob, TrainResult, World, train


def _begin(folder: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)  # it is that of the process that forked this one, which may have begun earlier
    os.environ[CACHE] = str(folder / str(os.getpid()))
    torch.set_num_threads(1)


def _run(data: bytes) -> bytes:
    store, call = unpickled(data)
    result: bytes = store.dumps(call())
    return result


@dataclasses.dataclass(frozen=True)
class _Item:
    function: Callable[[Any], Any]
    item: Any

    def __call__(self) -> Any:
        return self.function(self.item)


class _Boards(BaseManager):
    """Serves the board of sync points to the processes."""


_Boards.register("board", SyncBoard)


@dataclasses.dataclass(frozen=True)
class _Train:
    board: Any

    def __call__(self, job: TrainJob) -> TrainResult:
        return train(job, World(), discard, lambda: False, board=self.board)


class Elsewhere(LocalBackend):
    """Three such processes, one for each sub-model of the pinned run: sub-models wait for each other at sync points.

    Args:
        folder: Folder of their caches.
    """

    def __init__(self, folder: Path) -> None:
        self._processes = ProcessPoolExecutor(3, processes(), _begin, (folder, dict(os.environ)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._processes.shutdown()

    def _submit(self, store: RunStore, call: Callable[[], Any]) -> Future[bytes]:
        return self._processes.submit(_run, store.dumps((store, call)))

    def build_corpus(self, config: RunConfig, directory: Path, emit: Emit) -> dict[str, Any]:
        return corpus.build(config, directory, _Engine(self, RunStore.of(config.location)))

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
        return build_clusters(config, corpus_dir, model, directory, _Mapped(self, config), emit=emit, store=store)

    def call(self, pool: Any, emit: Emit, stop: StopFile, function: Any, *args: Any, **kwargs: Any) -> Any:
        return unpickled(self._submit(function.store, function).result())

    def call_without_slot(self, pool: Any, emit: Emit, stop: StopFile, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self.call(pool, emit, stop, function, *args, **kwargs)

    def reachable(self, emit: Emit) -> contextlib.nullcontext[Emit]:
        return contextlib.nullcontext(discard)

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
        with _Boards(ctx=processes()) as boards:
            board = boards.board()  # type: ignore[attr-defined]
            coordinator = SyncCoordinator(jobs, board, emit)
            running = [self._submit(job.store, _Item(_Train(board), job)) for job in jobs]
            while not all(future.done() for future in running):
                coordinator.advance()
                time.sleep(0.2)
        return [Trained(unpickled(future.result()), 1.0, {"low_memory": 1.0}) for future in running]


def _tables(function: Callable[[Any], Any], item: Any) -> list[Any]:
    return list(function(item))


@dataclasses.dataclass(frozen=True)
class _Engine:
    backend: Elsewhere
    store: RunStore

    def __call__(
        self, units: Sequence[Any], read: Callable[[Any], Any], here: Sequence[Any] = (), size: int | None = None
    ) -> _Tables:
        del size
        return _Tables(lambda: [*here, *self.each(read, units)], Path(), self)

    def each(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        futures = [self.backend._submit(self.store, functools.partial(_tables, function, item)) for item in items]
        return [found for future in futures for found in unpickled(future.result())]


@dataclasses.dataclass(frozen=True)
class _Tables(InProcess):
    engine: _Engine

    def map(self, function: Callable[[Any], Any]) -> _Tables:
        return dataclasses.replace(self, tables=lambda: self.engine.each(function, self.tables()))

    def written(self, function: Callable[[Any], Any]) -> list[Any]:
        return self.engine.each(function, self.tables())


class _Mapped:
    def __init__(self, backend: Elsewhere, config: RunConfig) -> None:
        self._backend, self._store = backend, RunStore.of(config.location)
        self.engine = _Engine(backend, self._store)

    def embed(self, parts: Sequence[Path], vectoriser: Path, directory: Path, progress: StageProgress) -> None:
        futures = []
        for half in filter(None, (parts[::2], parts[1::2])):
            files = Files([*half, vectoriser], [directory / part.name for part in half])
            call = on_files(
                self._store, files, embed_parts, half, vectoriser=vectoriser, directory=directory, events=discard
            )
            futures.append(self._backend._submit(self._store, call))
        for future in futures:
            future.result()
