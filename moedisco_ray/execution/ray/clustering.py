"""The cluster stage on Ray.

Ray Data reads the documents, vectorises them on a pool of actors and writes the vectors once. Then each of a few
actors takes some of the files that Ray Data wrote and holds those vectors for all Lloyd steps; a step sends it the
centroids and gets back sums and counts. A `map_batches` or aggregation per step would say the same in one line, but
plans and starts a new execution every time (0.1 s and more, against milliseconds for a call), and throws away what a
block remembers of the last step, which saves most of the distances. Because sums are exact, neither the number of
actors nor one that died and began again changes a bit of the result.
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

from moedisco_ray.backend import holding, vectors_kind
from moedisco_ray.core.config import Pool, RunConfig
from moedisco_ray.core.events import Emit
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.tasks import run_on
from moedisco_ray.stages.clustering.build import build_clusters as build
from moedisco_ray.stages.clustering.packing import pack_cluster
from moedisco_ray.stages.clustering.store import Shard, embed_table
from moedisco_ray.stages.clustering.vectors import load_vectoriser

_READ = ["id", "text", "tokens", "packed", "copies"]


def build_clusters(
    config: RunConfig, corpus_dir: Path, model_dir: Path, directory: Path, emit: Emit, stop: StopFile,
) -> dict[str, Any]:
    """`clustering.stage.build_clusters` on the connected Ray cluster.

    Args:
        config: The run's configuration.
        corpus_dir: The corpus artifact.
        model_dir: The model that `mean_token` and `hidden_state` look into.
        directory: Where the artifact goes; all nodes must see it.
        emit: Receives what is held of a pool meanwhile.
        stop: Ends the waiting for a slot of it.

    Raises:
        RunStopped: Somebody asked the run to end before there was one.
    """
    kind = vectors_kind(config, model_dir, {kind.key: session.slots(kind) for kind in config.pools.low_memory.kinds})
    seats = None if kind is None else VectoriserSlots(kind, emit, stop)
    workers = RayWorkers(corpus_dir / "tokenizer", seats, name=f"{config.name}-vectors")
    return build(config, corpus_dir, model_dir, directory, workers)


@dataclasses.dataclass(frozen=True)
class VectoriserSlots:
    """Slots of a pool, for the actors that make vectors.

    Attributes:
        pool: Which, of one node type.
        emit: Receives what is held.
        stop: Ends the waiting for the first one.
    """

    pool: Pool
    emit: Emit
    stop: StopFile

    @contextlib.contextmanager
    def taken(self, most: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Wait for a slot, and hold as many as there are.

        They count as held for the length of the block, those too whose actor waits for another run's to end.

        Args:
            most: How many there is work for.

        Yields:
            How many, and what an actor asks Ray for.
        """
        run_on(self.pool, self.emit, self.stop, seat)
        count = max(1, min(session.room(self.pool, 1), most))
        with holding(self.emit, self.pool, count, "cluster"):
            yield count, {"num_cpus": 0, "num_gpus": self.pool.gpu or None, "resources": {self.pool.resource: 1}}


def seat() -> None:
    """Nothing: whoever calls it on a worker of a pool has waited for one."""


class _Embedder:
    """Ray Data's actor: a vectoriser, loaded once."""

    def __init__(self, vectoriser: Path, device: str) -> None:
        self._vectoriser = load_vectoriser(vectoriser, device)

    def __call__(self, documents: pa.Table) -> pa.Table:
        return embed_table(self._vectoriser, documents)


@dataclasses.dataclass
class RayWorkers:
    """`clustering.stage.Workers` as Ray Data, actors and tasks.

    Attributes:
        tokenizer: The corpus' tokeniser directory.
        seats: Of the vectorising actors; None: each has a core of any node.
        most_shards: Most actors that hold vectors; None: one per CPU.
        name: Of the pass over the documents, in the Ray dashboard.
    """

    tokenizer: Path
    seats: VectoriserSlots | None = None
    most_shards: int | None = None
    name: str = "vectors"
    _shards: list[Any] = dataclasses.field(default_factory=list)

    def embed(self, parts: Sequence[Path], vectoriser: Path, directory: Path) -> None:
        """One pass of Ray Data over the documents."""
        paths = [str(path.resolve()) for path in parts]
        documents = ray.data.read_parquet(paths, override_num_blocks=len(parts))
        with self._seats(len(parts)) as (count, resources):
            device = "cuda" if resources.get("num_gpus") else "cpu"
            vectors = documents.select_columns(_READ).map_batches(
                _Embedder, fn_constructor_args=(vectoriser.resolve(), device), batch_size=1024, batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count), zero_copy_batch=True, **resources)
            vectors.set_name(self.name)
            vectors.write_parquet(str(directory.resolve()))

    @contextlib.contextmanager
    def _seats(self, most: int) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.seats is None:
            yield max(1, min(_cpus() - 1, most)), {}    # a core is left for reading
        else:
            with self.seats.taken(most) as seats:
                yield seats

    def hold(self, files: Sequence[Path]) -> None:
        """One actor per CPU, at most one per file, started anew wherever its node is lost."""
        count = max(1, min(len(files), self.most_shards or _cpus()))
        # Shards are idle while something else computes, so that they ask for no CPU and cannot wait for one for ever.
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(Shard)
        self._shards = [actor.remote([path.resolve() for path in files[i::count]]) for i in range(count)]

    def ask(self, method: str, *args: Any) -> list[Any]:
        """The same question to all shards at once."""
        stored = [ray.put(arg) for arg in args]
        return ray.get([getattr(shard, method).remote(*stored) for shard in self._shards])

    def release(self) -> None:
        """End the actors."""
        for shard in self._shards:
            ray.kill(shard)
        self._shards = []

    def pack(
        self, parts: Sequence[Path], assignments: Sequence[Path], count: int, directory: Path,
    ) -> list[dict[str, Any]]:
        """One task per cluster."""
        paths = [[path.resolve() for path in group] for group in (parts, assignments)]
        tokenizer = self.tokenizer.resolve()
        pack = ray.remote(pack_cluster)
        return ray.get([pack.remote(*paths, k, directory.resolve() / str(k), tokenizer) for k in range(count)])


def _cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))
