"""Assign the documents of one part to clusters and pack them.

The module must import quickly, because many short tasks run it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moedisco_ray.packed_tokens import Piece
from moedisco_ray.stages.clustering.balance import Assignment
from moedisco_ray.stages.clustering.distances import Array
from moedisco_ray.stages.clustering.store import ID, clusters_in, tokens_of, weights
from moedisco_ray.stages.text.packing import PACKED_COLUMNS, pack_part
from moedisco_ray.stages.text.tokenizer import Encoder


@dataclasses.dataclass(frozen=True)
class Part:
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
class Plan:
    """Settings for the assignment and packing of every part.

    Attributes:
        rule: Rule that assigns documents to clusters.
        directory: The cluster artifact, with the directories `assignments` and `shards/0` to `shards/E-1`.
        tokenizer: Directory of the corpus' tokenizer.
    """

    rule: Assignment
    directory: Path
    tokenizer: Path


@dataclasses.dataclass(frozen=True)
class Packed:
    """Figures of an assigned and packed part.

    Attributes:
        number: Position of the part among all parts.
        sources: Names of the sources, in order of their first documents.
        documents_PE: Number of documents of each source in each cluster.
        tokens_E: Training tokens in each cluster.
        pieces: Files of packed tokens of each cluster.
    """

    number: int
    sources: tuple[str, ...]
    documents_PE: Array
    tokens_E: Array
    pieces: tuple[tuple[Piece, ...], ...]


def finish_part(part: Part, plan: Plan) -> Packed:
    """Assign a part's documents, write `assignments/<name of the part>`, and pack their tokens, a piece per cluster.

    The documents are read once, for all clusters. The file of assignments has the columns `id` and `cluster`. A
    repeated call writes identical files.
    """
    table = pq.read_table(part.documents, columns=["id", "source", "packed", *PACKED_COLUMNS])
    clusters_N, count = clusters_in(part.vectors, plan.rule), len(plan.rule.prices_E)
    for folder in ("assignments", *(f"shards/{k}" for k in range(count))):
        (plan.directory / folder).mkdir(parents=True, exist_ok=True)  # this task may be the first on its machine
    assigned = pa.table({"id": table["id"].cast(ID), "cluster": clusters_N.astype(np.int32)})
    pq.write_table(assigned, plan.directory / "assignments" / part.documents.name)
    encoder = Encoder(plan.tokenizer)
    pieces = tuple(
        tuple(pack_part(table, part.number, plan.directory / "shards" / str(k), encoder, clusters_N == k))
        for k in range(count)
    )
    sources, codes_N = _encode(table["source"])
    documents_PE = np.bincount(codes_N * count + clusters_N, minlength=len(sources) * count).reshape(-1, count)
    return Packed(part.number, sources, documents_PE, tokens_of(clusters_N, weights(table), count), pieces)


def _encode(names: pa.ChunkedArray) -> tuple[tuple[str, ...], Array]:
    encoded = pa.concat_arrays(names.chunks or [pa.array([], names.type)]).dictionary_encode()
    return tuple(encoded.dictionary.to_pylist()), encoded.indices.to_numpy().astype(np.int64)
