"""Read documents as rows of tables in bounded memory: a task yields a table once it has read enough text for one.

A file may turn out to be damaged after documents of it have been read, in this task or in another one. With
`on_error: skip`, the task then adds a row with a note, and the documents of the file are left out later, when all notes
are known.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.records.events import Emit, Event, discard
from moedisco_ray.core.store.run_store import SHARED, RunStore
from moedisco_ray.stages.corpus.documents import (
    ID_BYTES,
    NEW,
    STAGED,
    dedupe_and_sort,
    id_column,
    id_matrix,
    ranges_of,
    staged_table,
)
from moedisco_ray.stages.corpus.near_duplicates import without_ids
from moedisco_ray.stages.corpus.readers import Slice, Unit, read_slice, reason, row_map_of
from moedisco_ray.stages.corpus.row_map import RowMap
from moedisco_ray.stages.tables import RANGE
from moedisco_ray.stages.text.cutting import Document
from moedisco_ray.stages.text.tally import Tally

READ = pa.schema([*STAGED, pa.field(RANGE, pa.int64()), pa.field("file", pa.int32()), pa.field("note", pa.string())])
"""Schema of documents as a reading task yields them: the columns of `STAGED`, and

- `range`: the range of ids that the document's id is in, of equal ranges in ascending order
- `file`: position of the file in the listing of the document's source
- `note`: null for a document. A row with a note is no document: it holds a `Note` about its file as JSON.
"""
_CHUNK_CHARACTERS = 8 << 20
"""Characters of text that a reading task collects as Python strings before it turns them into a table."""


class Note(NamedTuple):
    """What a reading task has to say about a slice of a file, besides its documents.

    Attributes:
        start: Where the slice begins.
        dropped: Number of rows that the source's `map` dropped.
        reason: Why the slice could not be read, if the source says `on_error: skip`; None if it was read.
        tally: Counts of its rows with conversations, completions or token ids: the fields of a `Tally`.
    """

    start: int
    dropped: int
    reason: str | None
    tally: Mapping[str, Any]


class Selection(NamedTuple):
    """Which rows to leave out of what was read.

    Attributes:
        damaged: Files that could not be read, as `file_keys` numbers them, in ascending order.
        repeated: Ids of near duplicates [n], from `near_duplicates.repeated`; None if they were not searched for.
    """

    damaged: NDArray[np.int64] = np.empty(0, dtype=np.int64)
    repeated: NDArray[np.void] | None = None


@dataclasses.dataclass(frozen=True)
class ReadUnit:
    """Reads the documents of a unit.

    Attributes:
        ranges: Number of ranges of ids.
        store: The run, which has the tokenizer that some sources need.
        events: Receives a `stage_progress` event with the number of documents of each table.
    """

    ranges: int
    store: RunStore = SHARED
    events: Emit = discard

    def __call__(self, unit: Unit, chunk: int = _CHUNK_CHARACTERS) -> Iterator[pa.Table]:
        """Yield the documents in tables of about `chunk` characters of text with the schema `READ`, and then notes.

        Raises:
            CorpusError: The unit cannot be read: a file is binary, damaged or unreadable, or lacks the text column.
            ConfigError: The source's `map` cannot be imported, or fails.
        """
        tokenizer = unit.source.tokenizer
        # A unit without documents would be a block without columns, which Ray Data cannot shuffle with others.
        yield READ.empty_table()
        with self.store.using(*([] if tokenizer is None else [tokenizer])):
            yield from self._tables(unit, chunk)

    def _tables(self, unit: Unit, chunk: int) -> Iterator[pa.Table]:
        notes: list[tuple[Slice, Note]] = []
        group = b""
        for documents, files in _chunks(unit, row_map_of(unit.source), notes, chunk):
            table = staged_table(documents, unit.source.order, group)
            group = table["group"][-1].as_py()
            yield _as_read(table, ranges_of(id_matrix(table), self.ranges), files, [None] * len(table))
            self.events(Event("stage_progress", "corpus", data={"done": len(table), "unit": "documents read"}))
        if notes:
            yield _noted(unit.source.order, notes)


def documents_in(read: pa.Table, selection: Selection, columns: Sequence[str] = tuple(STAGED.names)) -> pa.Table:
    """The distinct documents among rows with the schema `READ`, sorted by id, without those that are left out.

    Args:
        read: Either all rows of an id or none.
        selection: What to leave out.
        columns: Columns of `STAGED` to return; at least id, group, order and side.
    """
    found = intact(read.select([*columns, "file", "note"]), selection.damaged)
    distinct = dedupe_and_sort(found.select(list(columns)))
    return distinct if selection.repeated is None else without_ids(distinct, selection.repeated)


def intact(read: pa.Table, damaged: NDArray[np.int64]) -> pa.Table:
    """The documents among rows with the columns order, file and note of `READ`, without those of damaged files."""
    documents = read.filter(pc.is_null(read["note"])) if read["note"].null_count < len(read) else read
    if not len(damaged):
        return documents
    return documents.filter(pa.array(~np.isin(file_keys(documents), damaged)))


def file_keys(table: pa.Table) -> NDArray[np.int64]:
    """A number for the file of each row, different for each file of each source [n]."""
    return (table["order"].to_numpy().astype(np.int64) << 32) | table["file"].to_numpy()


def _chunks(
    unit: Unit, row_map: RowMap | None, notes: list[tuple[Slice, Note]], size: int
) -> Iterator[tuple[list[Document], list[int]]]:
    """Yield documents of about `size` characters, with the number of each document's file; append notes."""
    chunk: list[Document] = []
    files: list[int] = []
    held = 0
    for piece in unit.slices:
        before = 0 if row_map is None else row_map.dropped
        failure, tally = None, Tally()
        try:
            for document in read_slice(unit.source, piece, row_map, tally):
                chunk.append(document)
                held += len(document.text)
                if held >= size:
                    yield chunk, [*files, *[piece.number] * (len(chunk) - len(files))]
                    chunk, files, held = [], [], 0
        except CorpusError as error:
            if unit.source.settings.on_error == "fail":
                raise
            failure = reason(error)
        files += [piece.number] * (len(chunk) - len(files))
        dropped = 0 if row_map is None else row_map.dropped - before
        if failure is not None or dropped or tally != Tally():
            counts = dataclasses.asdict(tally) | {"unread": sorted(tally.unread)}
            notes.append((piece, Note(piece.start, dropped, failure, counts)))
    if chunk:
        yield chunk, files


def _noted(order: int, notes: Sequence[tuple[Slice, Note]]) -> pa.Table:
    rows = len(notes)
    nothing = id_column(bytes(ID_BYTES * rows))
    table = pa.table(
        [
            nothing,
            nothing,
            pa.array([order] * rows, pa.int32()),
            pa.array([NEW] * rows, pa.int8()),
            *(pa.nulls(rows, STAGED.field(name).type) for name in ("text", "tokens", "loss_mask")),
        ],
        schema=STAGED,
    )
    files, texts = [piece.number for piece, _ in notes], [json.dumps(note) for _, note in notes]
    return _as_read(table, np.zeros(rows, np.int64), files, texts)


def _as_read(table: pa.Table, ranges: NDArray[np.int64], files: Sequence[int], notes: Sequence[Any]) -> pa.Table:
    added = [pa.array(ranges), pa.array(files, pa.int32()), pa.array(notes, pa.string())]
    return pa.table([*table.columns, *added], schema=READ)
