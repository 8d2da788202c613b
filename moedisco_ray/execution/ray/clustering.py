"""The cluster stage on Ray.

The run's seats, or tasks where no model is needed, write the vectors of each part. The driver fits the clusters on a sample of
them. Then a task per part counts its documents in each cluster, once for every correction of the balance, and a last one assigns
and packs them. The tasks exchange a few numbers per cluster with the driver.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray

from moedisco_ray.backend import vectors_kind
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.events import Emit, StageProgress
from moedisco_ray.core.run_store import SHARED, RunStore
from moedisco_ray.core.run_work import Files, on_files, unpickled
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.event_mailbox import attempt_emitter, open_mailbox
from moedisco_ray.execution.ray.seats import Seats
from moedisco_ray.execution.ray.tasks import Slot
from moedisco_ray.stages.clustering.build import build_clusters as build
from moedisco_ray.stages.clustering.store import embed_parts

T = TypeVar("T")
R = TypeVar("R")


def build_clusters(
    config: RunConfig, *, corpus_dir: Path, model_dir: Path, directory: Path, emit: Emit, stop: StopFile, seats: Seats,
) -> dict[str, Any]:
    """Run `clustering.stage.build_clusters` on the connected Ray cluster.

    Args:
        config: The run's configuration.
        corpus_dir: The corpus artifact.
        model_dir: The model from which `mean_token` and `hidden_state` take their vectors.
        directory: Directory of the new artifact.
        emit: Receives the events about held slots, and `stage_progress` events.
        stop: Ends the wait for a slot.
        seats: The run's seats, which compute vectors.

    Raises:
        RunStopped: The run was asked to end before a slot was free.
    """
    store = RunStore.of(config.location)
    store.fetch(model_dir / "config.json")
    node_types = config.pools.low_memory.node_types
    node_type = vectors_kind(config, model_dir, {each.key: session.slots(each) for each in node_types})
    workers = RayWorkers(Slot(node_type, emit, stop, seats), store)
    return build(config, corpus_dir, model_dir, directory, workers, emit=emit)


@dataclasses.dataclass
class RayWorkers:
    """`clustering.build.Workers` with seats and tasks.

    Attributes:
        slot: Where vectors are computed.
        store: The run.
    """

    slot: Slot
    store: RunStore = SHARED

    def embed(self, parts: Sequence[Path], vectoriser: Path, directory: Path, progress: StageProgress) -> None:
        """Write the documents' vectors, on all slots at once. A slot that is lost repeats its parts on another."""
        pool = self.slot.pool
        slots = _cpus() if pool is None else session.room(pool)
        count = max(1, min(slots, len(parts)))
        files, vectoriser, directory = [path.absolute() for path in parts], vectoriser.absolute(), directory.absolute()
        with (
            open_mailbox(lambda event: progress.add(event.data["done"])) as mailbox,
            ThreadPoolExecutor(count, thread_name_prefix="vectors") as threads,
        ):
            def embed(share: Sequence[Path]) -> None:
                work = Files([*share, vectoriser], [directory / path.name for path in share])
                self.slot.run(on_files(
                    self.store, work, embed_parts, share, vectoriser=vectoriser, directory=directory,
                    events=attempt_emitter(mailbox.handle, ""), device="cuda" if pool is not None and pool.gpu else "cpu"))

            list(threads.map(embed, [files[i::count] for i in range(count)]))

    def each(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """Apply the function to each item in a task of its own."""
        stored, call = ray.put(function), ray.remote(_call)
        running = [call.remote(stored, self.store, self.store.dumps(item)) for item in items]
        while running:
            done, running = ray.wait(running)
            yield from map(unpickled, ray.get(done))


def _call(function: Callable[[Any], object], store: RunStore, item: bytes) -> bytes:
    return store.dumps(function(unpickled(item)))


def _cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))
