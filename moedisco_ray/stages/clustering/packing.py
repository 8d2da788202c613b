"""Assign documents to clusters and pack their tokens, a part of the corpus at a time.

The module must import quickly, because many short tasks run it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.packed_tokens import Piece
from moedisco_ray.stages.clustering.balance import Assignment, Loads
from moedisco_ray.stages.clustering.distances import Array
from moedisco_ray.stages.clustering.store import ID, clusters_in, read_vectors, tokens_of
from moedisco_ray.stages.tables import RANGE, divided
from moedisco_ray.stages.text.packing import PACKED_COLUMNS, pack_part
from moedisco_ray.stages.text.tokenizer import Encoder

LOADS = pa.schema([("cluster", pa.int64()), ("documents", pa.int64()), ("tokens", pa.int64())])
"""Schema of the numbers of documents and tokens in clusters."""
_READ = ["id", "source", "packed", *PACKED_COLUMNS]


class Part(NamedTuple):
    """One part of the corpus, with its vectors.

    Attributes:
        number: Position among all parts.
        documents: File with the part's documents, in the corpus artifact.
        vectors: Vector file of the same documents, in the same order.
    """

    number: int
    documents: Path
    vectors: Path


@dataclasses.dataclass(frozen=True)
class CountLoads:
    """Reads the vectors of a part, and counts its documents and tokens in each cluster under a rule."""

    rule: Assignment
    store: RunStore

    def __call__(self, part: Part) -> Iterator[pa.Table]:
        """Yield a row for each cluster, with the schema `LOADS`."""
        count = len(self.rule.prices_E)
        with self.store.using(part.vectors):
            for block in read_vectors([part.vectors]):
                clusters_N = self.rule.clusters(block.ids_N, block.x_ND)
                documents_E, tokens_E = (
                    np.bincount(clusters_N, minlength=count),
                    tokens_of(clusters_N, block.weights_N, count),
                )
                yield pa.table([pa.array(np.arange(count)), pa.array(documents_E), pa.array(tokens_E)], schema=LOADS)


def loads_in(table: pa.Table, count: int) -> Loads:
    """The sums over rows with the schema `LOADS`, for this number of clusters."""
    clusters = table["cluster"].to_numpy()
    documents_E, tokens_E = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    np.add.at(documents_E, clusters, table["documents"].to_numpy())
    np.add.at(tokens_E, clusters, table["tokens"].to_numpy())
    return Loads(documents_E, tokens_E)


@dataclasses.dataclass(frozen=True)
class ReadAssigned:
    """Reads the documents of a part, with the cluster of each under a rule."""

    rule: Assignment
    store: RunStore

    def __call__(self, part: Part) -> Iterator[pa.Table]:
        """Yield one table: what packing reads of the documents, their cluster, and as `range` the part's number."""
        with self.store.using(part.documents, part.vectors):
            documents = pq.read_table(part.documents, columns=_READ)
            clusters_N = clusters_in(part.vectors, self.rule)
        number = pa.array(np.full(len(documents), part.number))
        yield documents.append_column("cluster", pa.array(clusters_N.astype(np.int32))).append_column(RANGE, number)


class Packed(NamedTuple):
    """Figures of an assigned and packed part.

    Attributes:
        number: Position of the part among all parts.
        sources: Names of the sources, in order of their first documents.
        documents_PE: Number of documents of each source in each cluster.
        pieces: Files of packed tokens of each cluster.
    """

    number: int
    sources: tuple[str, ...]
    documents_PE: Array
    pieces: tuple[tuple[Piece, ...], ...]


@dataclasses.dataclass(frozen=True)
class PackParts:
    """Writes the clusters of documents and their packed tokens, a piece for each part and cluster.

    Attributes:
        clusters: Number of clusters.
        names: Names of the parts' files.
        directory: The cluster artifact.
        tokenizer: Directory of the corpus' tokenizer.
        length: Sequence length.
        store: The run.
    """

    clusters: int
    names: tuple[str, ...]
    directory: Path
    tokenizer: Path
    length: int
    store: RunStore

    def __call__(self, assigned: pa.Table) -> list[Packed]:
        """Write documents as `ReadAssigned` yields them: of each part either all or none.

        The file of assignments of a part has the columns `id` and `cluster`. A repeated call writes identical files.
        """
        with self.store.using(self.tokenizer):
            encoder = Encoder(self.tokenizer)
        return [self._write(number, documents, encoder) for number, documents in divided(assigned)]

    def _write(self, number: int, documents: pa.Table, encoder: Encoder) -> Packed:
        shards = [self.directory / "shards" / str(k) for k in range(self.clusters)]
        assignments = self.directory / "assignments" / self.names[number]
        for folder in (assignments.parent, *shards):
            folder.mkdir(parents=True, exist_ok=True)  # this task may be the first on its machine
        clusters_N = documents["cluster"].to_numpy().astype(np.int64)
        pq.write_table(pa.table({"id": documents["id"].cast(ID), "cluster": documents["cluster"]}), assignments)
        pieces = tuple(
            tuple(pack_part(documents, number, shard, encoder, clusters_N == k, length=self.length))
            for k, shard in enumerate(shards)
        )
        files = [shard / name for shard, found in zip(shards, pieces, strict=True) for name in _files_of(found)]
        self.store.publish(assignments, *files)
        sources, codes_N = _encode(documents["source"])
        documents_PE = np.bincount(
            codes_N * self.clusters + clusters_N, minlength=len(sources) * self.clusters
        ).reshape(-1, self.clusters)
        return Packed(number, sources, documents_PE, pieces)


def _files_of(pieces: tuple[Piece, ...]) -> list[str]:
    return [name for piece in pieces for name in piece.files]


def _encode(names: pa.ChunkedArray) -> tuple[tuple[str, ...], Array]:
    encoded = pa.concat_arrays(names.chunks or [pa.array([], names.type)]).dictionary_encode()
    return tuple(encoded.dictionary.to_pylist()), encoded.indices.to_numpy().astype(np.int64)
