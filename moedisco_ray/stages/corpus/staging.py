"""Read every text once and stage its documents on disk, divided by ranges of ids; see `shuffle`.

A task reads one unit: some files, or part of a file. Its memory does not depend on the size of the unit: it holds the
documents of at most two files of the shuffle.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from moedisco_ray.core.limits import BUCKET_BYTES
from moedisco_ray.stages.corpus.documents import STAGED, bucket_of_rows, dedupe_and_sort, staged_table
from moedisco_ray.stages.corpus.near_duplicates import without
from moedisco_ray.stages.corpus.readers import Unit, read_unit, row_map_of
from moedisco_ray.stages.corpus.shuffle import (
    FILE_BYTES,
    Buckets,
    Digits,
    MapTasks,
    Pieces,
    Scattered,
    read_pieces,
    scatter,
    shuffle,
)
from moedisco_ray.stages.text.cutting import Document
from moedisco_ray.stages.text.unseen import Skipped

_SMALL_BUCKET_BYTES = 1 << 20
"""Minimum bytes of text per bucket. A small corpus is divided down to this size, so that several cores can work on
it."""
_FEW_BUCKETS = 8
"""Maximum number of buckets smaller than `BUCKET_BYTES`."""
_CHUNK_CHARACTERS = 8 << 20
"""Characters of text that a reading task collects as Python strings before it turns them into a table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged(Scattered):
    """Result of a task that staged one unit.

    Attributes:
        order: Position of the unit's input (see `Input`) among all inputs.
        documents: Number of documents read, with duplicates.
        dropped: Number of rows that the source's `map` dropped.
        skipped: Files that could not be read, if the source says `on_error: skip`; the unit must be read again without
            them.
    """

    order: int
    documents: int
    dropped: int
    skipped: tuple[Skipped, ...]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """All staged documents whose ids are in one range.

    Attributes:
        index: Number of the bucket.
        staged: The documents.
        dropped: Ids of the near duplicates among the documents; None if near duplicates were not searched for.
    """

    index: int
    staged: Pieces
    dropped: Pieces | None = None


def bucket_count(text_bytes: int) -> int:
    """Number of buckets: one per 32 MB of text, or up to eight smaller ones, to use several cores."""
    return max(1, -(-text_bytes // BUCKET_BYTES), min(_FEW_BUCKETS, text_bytes // _SMALL_BUCKET_BYTES))


def stage_unit(unit: Unit, directory: Path, buckets: int, file_bytes: int = FILE_BYTES) -> Staged:
    """Read a unit and write its documents, divided by bucket, below `directory`.

    A second run overwrites the same files with the same bytes, so a task that died can be started again.

    Raises:
        CorpusError: The unit cannot be read; see `read_unit`.
        ConfigError: The source's `map` cannot be imported, or fails.
    """
    documents = 0
    skipped: list[Skipped] = []
    row_map = row_map_of(unit.source)

    def tables() -> Iterator[pa.Table]:
        nonlocal documents
        group = b""
        for chunk in _chunks(read_unit(unit, skipped, row_map), min(file_bytes, _CHUNK_CHARACTERS)):
            table = staged_table(chunk, unit.source.order, group)
            group = table["group"][-1].as_py()
            documents += len(chunk)
            yield table

    files = scatter(
        tables(),
        directory / "units" / f"unit-{unit.index:06d}",
        STAGED,
        _by_id(buckets),
        Digits.of(buckets),
        file_bytes=file_bytes,
    )
    return Staged(
        index=unit.index,
        order=unit.source.order,
        files=files,
        documents=documents,
        skipped=tuple(skipped),
        dropped=0 if row_map is None else row_map.dropped,
    )


def shuffle_documents(staged: Iterable[Staged], directory: Path, count: int, map_tasks: MapTasks) -> list[Bucket]:
    """Divide the staged documents into buckets."""
    pieces = shuffle(staged, directory, STAGED, _by_id(count), Digits.of(count), map_tasks=map_tasks)
    return [Bucket(found.index, found) for found in pieces]


def distinct_documents(bucket: Bucket, columns: Sequence[str] = tuple(STAGED.names)) -> pa.Table:
    """The bucket's documents without duplicates and near duplicates, sorted by id."""
    return without(dedupe_and_sort(read_pieces(bucket.staged, STAGED, columns)), bucket.dropped)


def _by_id(buckets: int) -> Buckets:
    return functools.partial(bucket_of_rows, buckets=buckets)


def _chunks(documents: Iterable[Document], characters: int) -> Iterable[Sequence[Document]]:
    chunk: list[Document] = []
    held = 0
    for document in documents:
        chunk.append(document)
        held += len(document.text)
        if held >= characters:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
