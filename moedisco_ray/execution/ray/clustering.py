"""The cluster stage on Ray.

The corpus is divided into parts. First, the vectors of each part's documents are computed: on the run's seats (warm
processes that hold slots) if this needs a model, else in CPU tasks. The driver fits the clusters on a sample of the
vectors. Then Ray Data reads all documents with their vectors: to count those in each cluster, each time that the driver
corrects the balance, and at last to pack them. Only a few numbers per cluster reach the driver.

Seats compute the vectors and not Ray Data's actors, because Ray Data 2.60 can neither be asked to end while its actors
wait for slots, nor leave out nodes, nor say when an actor holds its slot, which is what the bill counts.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from moedisco_ray.backend import vectors_kind
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Emit, StageProgress
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_work import Files, on_files
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.event_mailbox import RunMailbox, open_mailbox
from moedisco_ray.execution.ray.seats import Seats
from moedisco_ray.execution.ray.tables import RayEngine
from moedisco_ray.execution.ray.tasks import Slot
from moedisco_ray.stages.clustering.build import build_clusters as build
from moedisco_ray.stages.clustering.store import embed_parts


def build_clusters(
    config: RunConfig,
    *,
    corpus_dir: Path,
    model_dir: Path,
    directory: Path,
    emit: Emit,
    stop: StopFile,
    seats: Seats,
    store: RunStore | None = None,
    mailbox: RunMailbox | None = None,
) -> dict[str, Any]:
    """Run `clustering.stage.build_clusters` on the connected Ray cluster.

    Args:
        config: The run's configuration.
        corpus_dir: The corpus artifact.
        model_dir: The model from which `mean_token` and `hidden_state` take their vectors.
        directory: Directory of the new artifact.
        emit: Receives events about held slots, and `stage_progress` events.
        stop: Stop request, which ends the wait for a slot.
        seats: The run's seats (warm processes that hold slots), on which vectors are computed.
        store: The run; by default, that of the configuration.
        mailbox: The run's mailbox; None to start one.

    Raises:
        RunStopped: The run was asked to end before a slot was free.
    """
    store = store or RunStore.of(config.location)
    store.fetch(model_dir / "config.json")
    node_types = config.pools.low_memory.node_types
    node_type = vectors_kind(config, model_dir, {each.key: session.slots(each) for each in node_types})
    workers = RayWorkers(Slot(node_type, emit, stop, seats), RayEngine(f"{config.name}-cluster", store), mailbox)
    return build(config, corpus_dir, model_dir, directory, workers, emit=emit, store=store)


@dataclasses.dataclass
class RayWorkers:
    """Implements `clustering.build.Workers` with seats and Ray Data.

    Attributes:
        slot: Calls a function that computes vectors in the actor that holds a GPU of the low-memory pool, or in a CPU
            task.
        engine: Reads, counts and packs documents.
        mailbox: The run's mailbox; None to start one.
    """

    slot: Slot
    engine: RayEngine
    mailbox: RunMailbox | None = None

    def embed(self, parts: Sequence[Path], vectoriser: Path, directory: Path, progress: StageProgress) -> None:
        """Write the documents' vectors, on all slots in parallel.

        If a slot is lost, another slot computes its parts again.
        """
        pool = self.slot.pool
        slots = _cpus() if pool is None else self.slot.seats.aside.room(pool)
        count = max(1, min(slots, len(parts)))
        files, vectoriser, directory = [path.absolute() for path in parts], vectoriser.absolute(), directory.absolute()
        with (
            open_mailbox(lambda event: progress.add(event.data["done"]), self.mailbox, uuid.uuid4().hex) as mailbox,
            ThreadPoolExecutor(count, thread_name_prefix="vectors") as threads,
        ):

            def embed(share: Sequence[Path]) -> None:
                work = Files([*share, vectoriser], [directory / path.name for path in share])
                self.slot.run(
                    on_files(
                        self.engine.store,
                        work,
                        embed_parts,
                        share,
                        vectoriser=vectoriser,
                        directory=directory,
                        events=mailbox.emitter,
                        device="cuda" if pool is not None and pool.gpu else "cpu",
                    )
                )

            list(threads.map(embed, [files[i::count] for i in range(count)]))


def _cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))
