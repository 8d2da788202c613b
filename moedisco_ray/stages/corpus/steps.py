"""Steps of the corpus stage as picklable functions of tables; `build` puts them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.packed_tokens import Piece
from moedisco_ray.stages.corpus.documents import ID_BYTES, id_matrix, ranges_of
from moedisco_ray.stages.corpus.near_duplicates import LISTED, Banding, listed, ranges_of_keys, repeated, without_ids
from moedisco_ray.stages.corpus.parts import write_part
from moedisco_ray.stages.corpus.reading import Selection, documents_in, intact
from moedisco_ray.stages.corpus.rules import Rules, extremes, split, times
from moedisco_ray.stages.corpus.tokens import figures, tokenize
from moedisco_ray.stages.tables import RANGE, divided
from moedisco_ray.stages.text.packing import part_path
from moedisco_ray.stages.text.tokenizer import Encoder

_KEYS = ("id", "group", "order", "side")
SURVEYED = pa.schema(
    [
        ("order", pa.int32()),
        ("documents", pa.int64()),
        ("distinct", pa.int64()),
        ("kept", pa.int64()),
        ("smallest", pa.float64()),
        ("largest", pa.float64()),
        ("file", pa.int32()),
        ("note", pa.string()),
    ]
)
"""Schema of surveys: a row per input, or a note about a file (see `reading.READ`).

- `documents`: number of documents, with duplicates
- `distinct`: number of distinct documents; each counts for the input that keeps it
- `kept`: of these, the number without near duplicates
- `smallest`, `largest`: see `rules.extremes`
"""
_LISTED = LISTED.append(pa.field(RANGE, pa.int64()))
SAMPLED = pa.schema([("id", pa.binary(ID_BYTES)), ("text", pa.large_string())])


@dataclasses.dataclass(frozen=True)
class Survey:
    """Counts the documents that were read, finds the extremes of their validation hashes, and gathers the notes."""

    rules: Rules
    selection: Selection

    def __call__(self, read: pa.Table) -> Iterator[pa.Table]:
        """Yield a row for each input, and one for each note."""
        count = len(self.rules.names)
        documents = intact(read.select(["order", "file", "note"]), self.selection.damaged)
        distinct = documents_in(read, Selection(self.selection.damaged), _KEYS)
        kept = distinct if self.selection.repeated is None else without_ids(distinct, self.selection.repeated)
        found_S2 = extremes(kept, self.rules)
        counts = [np.bincount(table["order"].to_numpy(), minlength=count) for table in (documents, distinct, kept)]
        nulls = [pa.nulls(count, SURVEYED.field(name).type) for name in ("file", "note")]
        yield pa.table([np.arange(count, dtype=np.int32), *counts, *found_S2.T, *nulls], schema=SURVEYED)
        notes = read.filter(read["note"].is_valid())
        zeros = np.zeros(len(notes), dtype=np.int64)
        no_extremes = zeros + np.inf, zeros - np.inf
        yield pa.table(
            [notes["order"], zeros, zeros, zeros, *no_extremes, notes["file"], notes["note"]], schema=SURVEYED
        )


@dataclasses.dataclass(frozen=True)
class ListDocuments:
    """Lists the documents under the keys of their bands; see `near_duplicates`.

    Attributes:
        ranges: Number of ranges of keys.
    """

    rules: Rules
    selection: Selection
    banding: Banding
    ranges: int

    def __call__(self, read: pa.Table) -> Iterator[pa.Table]:
        """Yield lists with the schema `near_duplicates.LISTED` and the column `range`."""
        documents = documents_in(read, self.selection)
        yield _LISTED.empty_table()  # gives the result its schema if nothing is listed
        for found in listed(documents.filter(pa.array(times(documents, self.rules) > 0)), self.banding):
            yield found.append_column(RANGE, pa.array(ranges_of_keys(found, self.ranges)))


@dataclasses.dataclass(frozen=True)
class FindRepeated:
    """Finds near duplicates among documents that are listed under their keys."""

    banding: Banding

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield their ids, with the schema `near_duplicates.DROPPED`."""
        yield repeated(table, self.banding)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Selects the training documents in the first ranges of ids: a uniform sample, since an id is a hash of the text.

    Attributes:
        ranges: Number of ranges.
    """

    rules: Rules
    selection: Selection
    ranges: int

    def __call__(self, read: pa.Table) -> Iterator[pa.Table]:
        """Yield their ids and texts, with the schema `SAMPLED`."""
        first = read.filter(pa.array(read[RANGE].to_numpy() < self.ranges))
        decided = split(documents_in(first, self.selection), self.rules)
        yield decided.filter(pa.array(~decided["held_out"].to_numpy())).select(SAMPLED.names)


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Decides which documents stay, and tokenizes them.

    Attributes:
        tokenizer: Directory of the tokenizer, in the run.
        store: The run.
    """

    rules: Rules
    selection: Selection
    tokenizer: Path
    store: RunStore

    def __call__(self, read: pa.Table) -> Iterator[pa.Table]:
        """Yield the documents in ascending order of id, with the schema `documents.DOCUMENTS`."""
        with self.store.using(self.tokenizer):
            encoder = Encoder(self.tokenizer)
        yield tokenize(split(documents_in(read, self.selection), self.rules), encoder, self.rules)


class Written(NamedTuple):
    """Figures of the documents in one range of ids that were written.

    Attributes:
        train: Figures of the training documents, as `tokens.figures` returns them.
        validation: The same figures of the validation documents.
        pieces: Files of packed training tokens.
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class WriteParts:
    """Writes documents and packed tokens, a part for each range of ids.

    Attributes:
        ranges: Number of ranges.
        length: Sequence length.
        directory: The artifact.
        tokenizer: Directory of the tokenizer, in the run.
        store: The run.
        events: Receives a `stage_progress` event with the number of documents of each part.
    """

    rules: Rules
    ranges: int
    length: int
    directory: Path
    tokenizer: Path
    store: RunStore
    events: Emit

    def __call__(self, documents: pa.Table) -> list[Written]:
        """Write tokenized documents: of each range either all, in ascending order of id, or none."""
        with self.store.using(self.tokenizer):
            encoder = Encoder(self.tokenizer)
        ranged = documents.append_column(RANGE, pa.array(ranges_of(id_matrix(documents), self.ranges)))
        return [self._write(number, part.drop_columns(RANGE), encoder) for number, part in divided(ranged)]

    def _write(self, number: int, documents: pa.Table, encoder: Encoder) -> Written:
        train, validation, pieces = write_part(documents, number, self.directory, encoder, self.length)
        self.store.publish(
            *(part_path(self.directory / side, number) for side in ("train", "validation")),
            *(self.directory / "shards" / name for piece in pieces for name in piece.files),
        )
        self.events(Event("stage_progress", "corpus", data={"done": len(documents), "unit": "documents tokenized"}))
        return Written(figures(train, self.rules), figures(validation, self.rules), pieces)
