"""Files of document vectors, written and read in blocks, so that memory does not depend on the size of a file.

A vector file is Parquet with three columns:

- `id`: 16 bytes
- `weight`: tokens that the document adds to training, with special tokens, times its copies (int64)
- `vector`: fixed-size list of float32, before centring

Shapes: N documents, D dimensions, E clusters.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.stages.clustering.balance import Assignment, Costs, document_costs
from moedisco_ray.stages.clustering.distances import Array
from moedisco_ray.stages.clustering.vectors import Vectoriser, load_vectoriser

ID = pa.binary(16)
ROWS = 8192
"""Maximum number of rows in a block: 8 MB of vectors of 256 dimensions."""
_EMBEDDED = ["id", "text", "tokens", "packed", "copies"]


def embed_parts(parts: Sequence[Path], vectoriser: Path, directory: Path, events: Emit, device: str = "cpu") -> None:
    """Write a vector file for each part of the corpus, under the part's name, with one block of documents in memory.

    Args:
        parts: Files of documents.
        vectoriser: Directory of the fitted vectoriser.
        directory: Directory of the vector files.
        events: Receives a `stage_progress` event with the number of documents of each part.
        device: Device of the model whose hidden states are the vectors.
    """
    loaded = load_vectoriser(vectoriser, device)
    for part in parts:
        path = directory / part.name
        # Each attempt of a task writes its own draft, because the previous attempt may still run.
        draft = path.with_suffix(f".{uuid.uuid4().hex}")
        _write_tables((embed_table(loaded, documents) for documents in _blocks(part, _EMBEDDED)), draft)
        draft.replace(path)
        events(Event("stage_progress", "cluster", data={"done": pq.read_metadata(path).num_rows}))


def embed_table(vectoriser: Vectoriser, documents: pa.Table) -> pa.Table:
    """Vectorise a table of documents (`id`, `text`, `tokens`, `packed`, `copies`) into rows of a vector file."""
    x_ND = vectoriser.embed(documents["text"].to_pylist(), token_arrays(documents))
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
    return np.concatenate(
        [
            np.empty(0, dtype="S16"),
            *(
                np.frombuffer(chunk.buffers()[1], dtype="S16", count=len(chunk), offset=chunk.offset * ID.byte_width)
                for chunk in column.cast(ID).chunks
                if len(chunk)
            ),
        ]
    )


class Vectors(NamedTuple):
    """Rows of vector files: ids, weights, and uncentred vectors (float32 [N, D])."""

    ids_N: Array
    weights_N: Array
    x_ND: Array


def read_vectors(files: Iterable[Path]) -> Iterator[Vectors]:
    """Yield the rows of vector files in order, in blocks of at most 8,192."""
    for path in files:
        for table in _blocks(path, ["id", "weight", "vector"]):
            x_ND = pc.list_flatten(table["vector"]).to_numpy().reshape(len(table), table["vector"].type.list_size)
            yield Vectors(id_array(table["id"]), table["weight"].to_numpy(), x_ND)


def first_vectors(files: Sequence[Path], count: int) -> Array:
    """The first `count` vectors, uncentred, float32 [count, D]."""
    return np.concatenate([block.x_ND for block in _first(files, count)])


def first_costs(files: Sequence[Path], count: int, centre_D: Array | None, centroids_ED: Array | None) -> Costs:
    """Costs of the first `count` documents, computed block by block."""
    blocks = [
        (block.ids_N, block.weights_N, document_costs(block.x_ND, centre_D, centroids_ED))
        for block in _first(files, count)
    ]
    return Costs(*map(np.concatenate, zip(*blocks, strict=True)))


def clusters_in(file: Path, rule: Assignment) -> Array:
    """Cluster of each document of a vector file under a rule, int64 [N]."""
    blocks = [rule.clusters(block.ids_N, block.x_ND) for block in read_vectors([file])]
    return np.concatenate([np.empty(0, dtype=np.int64), *blocks])


def _first(files: Sequence[Path], count: int) -> Iterator[Vectors]:
    for block in read_vectors(files):
        yield Vectors(*(column[:count] for column in block))
        count -= len(block.ids_N)
        if count <= 0:
            return


def _blocks(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield the rows of a Parquet file in blocks; a file without rows gives one empty block."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        schema = pa.schema([file.schema_arrow.field(name) for name in columns])
        if not file.metadata.num_rows:
            yield schema.empty_table()
        for batch in file.iter_batches(ROWS, columns=columns):
            yield pa.Table.from_batches([batch]).select(columns)


def _write_tables(tables: Iterator[pa.Table], path: Path) -> None:
    first = next(tables)
    with pq.ParquetWriter(path, first.schema, use_dictionary=False) as file:
        for table in itertools.chain([first], tables):
            file.write_table(table)
