"""The cluster stage on Ray.

Ray Data reads the documents, vectorises them on a pool of actors and writes the vectors once. Then a few actors each load some of
these vector files and keep them for all Lloyd steps; a step sends the centroids and returns sums and counts. A `map_batches` or
aggregation per step would be shorter, but it plans and starts a new execution every time (0.1 s or more, against milliseconds for a
call), and loses the distances that an actor keeps from the last step to save most of the computation. Sums are exact: neither
the number of actors nor the restart of one changes a bit of the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data

from moedisco_ray.backend import held_workers, vectors_kind
from moedisco_ray.core.config import Pool, RunConfig
from moedisco_ray.core.events import Emit, Event, StageProgress
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.event_mailbox import attempt_emitter, open_mailbox
from moedisco_ray.execution.ray.tasks import run_on
from moedisco_ray.stages.clustering.build import build_clusters as build
from moedisco_ray.stages.clustering.packing import pack_cluster
from moedisco_ray.stages.clustering.store import Shard, embed_table
from moedisco_ray.stages.clustering.vectors import load_vectoriser

_READ = ["id", "text", "tokens", "packed", "copies"]


def build_clusters(
    config: RunConfig, *, corpus_dir: Path, model_dir: Path, directory: Path, emit: Emit, stop: StopFile,
) -> dict[str, Any]:
    """Run `clustering.stage.build_clusters` on the connected Ray cluster.

    Args:
        config: The run's configuration.
        corpus_dir: The corpus artifact.
        model_dir: The model from which `mean_token` and `hidden_state` take their vectors.
        directory: Directory of the new artifact; all nodes must see it.
        emit: Receives the events about held slots, and `stage_progress` events.
        stop: Ends the wait for a slot.

    Raises:
        RunStopped: The run was asked to end before a slot was free.
    """
    node_types = config.pools.low_memory.node_types
    node_type = vectors_kind(config, model_dir, {each.key: session.slots(each) for each in node_types})
    slots = None if node_type is None else VectoriserSlots(node_type, emit, stop)
    workers = RayWorkers(corpus_dir / "tokenizer", slots, name=f"{config.name}-vectors")
    return build(config, corpus_dir, model_dir, directory, workers, emit=emit)


@dataclasses.dataclass(frozen=True)
class VectoriserSlots:
    """Slots of a pool for the actors that compute vectors.

    Attributes:
        pool: One node type of a pool.
        emit: Receives the events about held slots.
        stop: Ends the wait for the first slot.
    """

    pool: Pool
    emit: Emit
    stop: StopFile

    @contextlib.contextmanager
    def taken(self, most: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Wait for one slot, and take all that are free.

        They count as held until the block ends, even while another run's actor has not yet freed a slot.

        Args:
            most: Maximum number of slots to take.

        Yields:
            The number of slots, and the resources of one actor.
        """
        run_on(self.pool, self.emit, self.stop, wait_for_slot)
        count = max(1, min(session.room(self.pool, 1), most))
        with held_workers(self.emit, self.pool, count, "cluster"):
            yield count, {"num_cpus": 0, "num_gpus": self.pool.gpu or None, "resources": {self.pool.resource: 1}}


def wait_for_slot() -> None:
    """Do nothing. A call in a slot of the pool returns once a slot was free."""


class _Embedder:
    """Actor of Ray Data: a vectoriser that is loaded once; `emit` receives the size of each batch."""

    def __init__(self, vectoriser: Path, device: str, emit: Emit) -> None:
        self._vectoriser = load_vectoriser(vectoriser, device)
        self._emit = emit

    def __call__(self, documents: pa.Table) -> pa.Table:
        vectors = embed_table(self._vectoriser, documents)
        self._emit(Event("stage_progress", "cluster", data={"done": len(vectors)}))
        return vectors


@dataclasses.dataclass
class RayWorkers:
    """`clustering.stage.Workers` with Ray Data, actors and tasks.

    Attributes:
        tokenizer: Directory of the corpus' tokenizer.
        slots: Slots of the vectorising actors; None: each takes a core of any node.
        max_actors: Maximum number of actors that keep vectors; None: one per CPU.
        name: Name of the pass over the documents in the Ray dashboard.
    """

    tokenizer: Path
    slots: VectoriserSlots | None = None
    max_actors: int | None = None
    name: str = "vectors"
    _actors: list[Any] = dataclasses.field(default_factory=list)

    def embed(self, parts: Sequence[Path], vectoriser: Path, directory: Path, progress: StageProgress) -> None:
        """Write the documents' vectors in one pass of Ray Data."""
        paths = [str(path.resolve()) for path in parts]
        documents = ray.data.read_parquet(paths, override_num_blocks=len(parts))
        with (
            self._take_slots(len(parts)) as (count, resources),
            open_mailbox(lambda event: progress.add(event.data["done"])) as mailbox,
        ):
            device = "cuda" if resources.get("num_gpus") else "cpu"
            vectors = documents.select_columns(_READ).map_batches(
                _Embedder, fn_constructor_args=(vectoriser.resolve(), device, attempt_emitter(mailbox.handle, "")),
                batch_size=1024, batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count), zero_copy_batch=True, **resources)
            vectors.set_name(self.name)
            vectors.write_parquet(str(directory.resolve()))

    @contextlib.contextmanager
    def _take_slots(self, most: int) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.slots is None:
            yield max(1, min(_cpus() - 1, most)), {}    # one core is left for reading
        else:
            with self.slots.taken(most) as taken:
                yield taken

    def hold(self, files: Sequence[Path]) -> None:
        """Start one actor per CPU, at most one per file; Ray restarts an actor whose node is lost."""
        count = max(1, min(len(files), self.max_actors or _cpus()))
        # The actors request no CPU, because the request might never be granted.
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(Shard)
        self._actors = [actor.remote([path.resolve() for path in files[i::count]]) for i in range(count)]

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Call a method of all actors at once."""
        stored = [ray.put(arg) for arg in args]
        return ray.get([getattr(actor, method).remote(*stored) for actor in self._actors])

    def release(self) -> None:
        """Stop the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def pack(
        self, parts: Sequence[Path], assignments: Sequence[Path], count: int, directory: Path,
    ) -> list[dict[str, Any]]:
        """Pack each cluster in a task of its own."""
        paths = [[path.resolve() for path in group] for group in (parts, assignments)]
        tokenizer = self.tokenizer.resolve()
        pack = ray.remote(pack_cluster)
        return ray.get([pack.remote(*paths, k, directory.resolve() / str(k), tokenizer) for k in range(count)])


def _cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))
