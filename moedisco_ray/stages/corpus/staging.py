"""Read every text once and stage its documents on disk, divided into buckets by id.

A task reads one unit (some files, or part of a file) and writes one Arrow file. Each record batch in it holds documents of one
bucket. The task returns the bucket of each batch, so that a later task reads only the batches of its bucket. There is one file per
unit for any number of buckets. A task needs a few megabytes of memory, however much it reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from moedisco_ray.stages.corpus.documents import STAGED, bucket_of, id_matrix, staged_table
from moedisco_ray.stages.corpus.readers import Unit, read_unit
from moedisco_ray.stages.text.cutting import Document
from moedisco_ray.stages.text.unseen import Skipped

BUCKET_BYTES = 64 << 20
"""Bytes of text per bucket, which one task holds in memory."""
_SMALL_BUCKET_BYTES = 1 << 20
"""Minimum bytes of text per bucket. A small corpus is divided down to this size, so that several cores can work on it."""
_FEW_BUCKETS = 8
"""Maximum number of buckets smaller than `BUCKET_BYTES`."""
_FLUSH_CHARACTERS = 8 << 20
"""Characters of text that a reading task collects before it writes them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged:
    """Result of a task that staged one unit.

    Attributes:
        order: Position of the unit's input (see `Input`) among all inputs.
        path: The Arrow file with the documents.
        batches: Bucket of each record batch in the file.
        documents: Number of documents read, with duplicates.
        skipped: Files that could not be read, if the source says `on_error: skip`; the unit must be read again without them.
    """

    index: int
    order: int
    path: Path
    batches: tuple[int, ...]
    documents: int
    skipped: tuple[Skipped, ...]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """All staged documents whose ids are in one range.

    Attributes:
        pieces: Staged files with documents of the bucket, each with the positions of the record batches that hold them.
    """

    index: int
    count: int
    pieces: tuple[tuple[Path, tuple[int, ...]], ...]


def bucket_count(text_bytes: int) -> int:
    """Number of buckets: one per 64 MB of text, or up to eight smaller ones, so that a small corpus uses several cores."""
    return max(1, -(-text_bytes // BUCKET_BYTES), min(_FEW_BUCKETS, text_bytes // _SMALL_BUCKET_BYTES))


def stage_unit(unit: Unit, directory: Path, buckets: int, flush: int = _FLUSH_CHARACTERS) -> Staged:
    """Read a unit and write its documents, sorted by bucket, to `directory`.

    A second run overwrites the same file with the same bytes, so a task that died can be started again.

    Raises:
        CorpusError: The unit cannot be read; see `read_unit`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"unit-{unit.index:06d}.arrow"
    owners: list[int] = []
    documents = 0
    group = b""
    skipped: list[Skipped] = []
    # Each attempt writes to its own draft: if a node loses its network, its attempt and a second one may run at the same time.
    draft = path.with_suffix(f".{uuid.uuid4().hex}")
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(pa.OSFile(str(draft), "wb"))
        writer = stack.enter_context(pa.ipc.new_file(sink, STAGED))
        for chunk in _chunks(read_unit(unit, skipped), flush):
            table = staged_table(chunk, unit.source.order, group)
            group = table["group"][-1].as_py()
            documents += len(chunk)
            owner = bucket_of(id_matrix(table), buckets)
            order = np.argsort(owner, kind="stable")
            for rows in np.split(order, np.flatnonzero(np.diff(owner[order])) + 1):
                owners.append(int(owner[rows[0]]))
                writer.write_batch(table.take(pa.array(rows)).combine_chunks().to_batches()[0])
    draft.replace(path)
    return Staged(
        index=unit.index, order=unit.source.order, path=path, batches=tuple(owners), documents=documents, skipped=tuple(skipped))


def plan_buckets(staged: Iterable[Staged], count: int) -> list[Bucket]:
    """Collect the record batches of each bucket, in the order of the units."""
    pieces: list[list[tuple[Path, tuple[int, ...]]]] = [[] for _ in range(count)]
    for report in sorted(staged, key=lambda report: report.index):
        positions: dict[int, list[int]] = {}
        for position, bucket in enumerate(report.batches):
            positions.setdefault(bucket, []).append(position)
        for bucket, batches in positions.items():
            pieces[bucket].append((report.path, tuple(batches)))
    return [Bucket(index, count, tuple(found)) for index, found in enumerate(pieces)]


def read_bucket(bucket: Bucket, columns: Sequence[str] = tuple(STAGED.names)) -> pa.Table:
    """All staged documents of a bucket, with duplicates, in no particular order."""
    batches: list[pa.RecordBatch] = []
    for path, positions in bucket.pieces:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as staged:
            batches += [staged.get_batch(position).select(columns) for position in positions]
    return pa.Table.from_batches(batches, schema=pa.schema([STAGED.field(name) for name in columns]))


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
