"""Document vectors: the files on disk, and shards of them in memory that compute clustering steps.

A vector file is Parquet with three columns:

- `id`: 16 bytes
- `weight`: tokens that the document adds to training, with special tokens, times its copies (int64)
- `vector`: fixed-size list of float32, before centring

Shapes: N documents, D dimensions, K or E clusters, R restarts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moedisco_ray.core.events import Emit, Event
from moedisco_ray.stages.clustering.balance import Assignment, Loads, document_costs
from moedisco_ray.stages.clustering.blocks import Block, Statistics
from moedisco_ray.stages.clustering.grid import Array, Grid, peak
from moedisco_ray.stages.clustering.vectors import Vectoriser, adjust, load_vectoriser

ID = pa.binary(16)


def embed_parts(parts: Sequence[Path], vectoriser: Path, directory: Path, events: Emit, device: str = "cpu") -> None:
    """Write one vector file, with the part's name, for each part of the corpus.

    Args:
        parts: Files of documents.
        vectoriser: Directory of the fitted vectoriser.
        directory: Directory of the vector files.
        events: Receives a `stage_progress` event with the number of documents of each part.
        device: Device of the model whose hidden states are the vectors.
    """
    loaded = load_vectoriser(vectoriser, device)
    for part in parts:
        vectors = embed_table(loaded, pq.read_table(part, columns=["id", "text", "tokens", "packed", "copies"]))
        pq.write_table(vectors, directory / part.name)
        events(Event("stage_progress", "cluster", data={"done": len(vectors)}))


def embed_table(vectoriser: Vectoriser, documents: pa.Table) -> pa.Table:
    """Vectorise a table of documents (`id`, `text`, `tokens`, `packed`, `copies`) into rows of a vector file."""
    tokens = token_arrays(documents)
    x_ND = vectoriser.embed(documents["text"].to_pylist(), tokens)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), x_ND.shape[1])
    return pa.table({"id": documents["id"].cast(ID), "weight": weights(documents), "vector": vectors})


def token_arrays(documents: pa.Table) -> list[Array]:
    """The `tokens` column as one array per document."""
    arrays: list[Array] = []
    for chunk in documents["tokens"].chunks:
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy(zero_copy_only=False)
        arrays += [values[start:stop] for start, stop in itertools.pairwise(offsets)]
    return arrays


def weights(documents: pa.Table) -> Array:
    """Tokens that each document adds to training, int64 [N]: packed tokens times copies."""
    return documents["packed"].to_numpy().astype(np.int64) * documents["copies"].to_numpy().astype(np.int64)


def tokens_of(clusters_N: Array, weights_N: Array, count: int) -> Array:
    """Tokens in each cluster, int64 [count]; exact up to 2^53."""
    return np.bincount(clusters_N, weights_N, minlength=count).astype(np.int64)


def id_array(column: pa.ChunkedArray) -> Array:
    """Ids as numpy S16 [N], which sort like bytes."""
    return np.array(column.to_pylist(), dtype="S16")


def vector_matrix(table: pa.Table) -> Array:
    """The `vector` column of a vector file, float32 [N, D]."""
    x_ND: Array = pc.list_flatten(table["vector"]).to_numpy().reshape(len(table), -1).astype(np.float32)
    return x_ND


class Shard:
    """Some vector files in memory: 8 D bytes per document in k-means, 32 for id, weight and norm, 12 per running restart.

    A new shard of the same files returns the same results: its memory of earlier steps only saves work.

    Args:
        files: Vector files, whose rows are kept in this order.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        table = pa.concat_tables([pq.read_table(path, columns=["id", "weight", "vector"]) for path in files])
        self._ids_N, self._x_ND = id_array(table["id"]), vector_matrix(table)
        self._weights_N = table["weight"].to_numpy()
        self._blocks: dict[bytes, Block] = {}

    def sample(self, last: bytes) -> tuple[Array, Array]:
        """Ids and vectors (before centring) of the documents with an id up to `last`."""
        chosen = self._ids_N <= np.bytes_(last)
        return self._ids_N[chosen], self._x_ND[chosen]

    def peak(self, centre_D: Array | None, origin_D: Array) -> float:
        """Largest absolute coordinate relative to the origin."""
        return peak(adjust(self._x_ND, centre_D), origin_D)

    def step(self, centre_D: Array | None, grid: Grid, centroids_RKD: Array, running: Sequence[int]) -> Statistics:
        """Statistics of a Lloyd step; see `blocks.Block.step`."""
        key = grid.origin_D.tobytes()
        if key not in self._blocks:
            self._blocks = {key: Block(grid.snap(adjust(self._x_ND, centre_D)), grid)}
        return self._blocks[key].step(centroids_RKD, running)

    def costs(self, last: bytes, centre_D: Array | None, centroids_ED: Array | None) -> tuple[Array, Array, Array]:
        """Ids, weights, and float32 costs [N, E] of the documents with an id up to `last`."""
        self._blocks = {}
        chosen = self._ids_N <= np.bytes_(last)
        return self._ids_N[chosen], self._weights_N[chosen], document_costs(self._x_ND[chosen], centre_D, centroids_ED)

    def loads(self, rule: Assignment) -> Loads:
        """Documents and tokens in each cluster under a rule."""
        clusters_N, count = rule.clusters(self._ids_N, self._x_ND), len(rule.prices_E)
        return Loads(np.bincount(clusters_N, minlength=count), tokens_of(clusters_N, self._weights_N, count))
