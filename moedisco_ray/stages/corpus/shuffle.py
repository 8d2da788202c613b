"""Shuffle rows from the tasks that write them to the tasks that read them, through files: a radix partition by bucket.

Each row belongs to one of B buckets. Each pass divides the rows by one digit of their bucket's number in base f, the
most significant digit first. Its tasks write files of about 32 MB; every file has f record batches, one per digit. A
task of the next pass reads the batches of one digit from up to f files and divides their rows by the next digit. After
the last pass, every record batch belongs to one bucket.

One pass is enough for up to 128 buckets (4 GB of text), two are enough for 16,384 (512 GB). So a record batch has 0.25
MB or more, and the number of reads grows with the text, not with its square. The caller holds one file name per 32 MB
of text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R")

Buckets = Callable[[pa.Table], NDArray[np.int64]]
"""Picklable function that returns the number of the bucket of each row of a table."""

FILE_BYTES = 32 << 20
"""Bytes of rows that a task collects before it writes a file. The task needs twice this memory while it writes."""
_FAN_OUT = 128
"""Maximum number of record batches in a file, so that a batch of a full file has at least 0.25 MB."""


class MapTasks(Protocol):
    """A function that applies a picklable function to each item and returns the results in any order."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]: ...


def in_this_process(function: Callable[[T], R], items: Sequence[T]) -> Iterable[R]:
    """Run one task after the other in this process."""
    return map(function, items)


@dataclasses.dataclass(frozen=True)
class Digits:
    """Number of passes that divide rows into buckets, and the base of the digits.

    Attributes:
        buckets: Number of buckets.
        base: Base of the digits, and number of record batches in a file.
        passes: Number of passes.
    """

    buckets: int
    base: int
    passes: int

    @classmethod
    def of(cls, buckets: int) -> Digits:
        """The fewest passes that suffice for a number of buckets, and the smallest base for these passes."""
        passes = 1
        while _FAN_OUT**passes < buckets:
            passes += 1
        base = 1
        while base**passes < buckets:
            base += 1
        return cls(buckets, base, passes)

    def of_pass(self, number: int, buckets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The digit of each bucket's number by which pass `number` divides; passes are counted from 1."""
        return buckets // self.base ** (self.passes - number) % self.base


@dataclasses.dataclass(frozen=True)
class Scattered:
    """Files that one task wrote.

    Attributes:
        index: Number of the task.
        files: The Arrow files, in order. Record batch d of each holds the rows whose bucket number has digit d.
    """

    index: int
    files: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """All rows of one bucket, or of a range of buckets.

    Attributes:
        index: Number of the bucket or range.
        files: Files with the rows.
        batch: Position of the record batch with these rows in each file.
    """

    index: int
    files: tuple[Path, ...]
    batch: int


def scatter(
    tables: Iterable[pa.Table],
    path: Path,
    schema: pa.Schema,
    buckets: Buckets,
    digits: Digits,
    *,
    number: int = 1,
    file_bytes: int = FILE_BYTES,
) -> tuple[Path, ...]:
    """Write rows to files in which each record batch has the rows with one digit of the bucket's number.

    A second attempt writes files with the same bytes.

    Args:
        tables: The rows.
        path: Common prefix of the files; its directory is made when absent.
        schema: Schema of the rows.
        buckets: Function that returns the bucket of each row.
        digits: Number of passes and base of the digits.
        number: Number of the pass, counted from 1.
        file_bytes: Bytes of rows to collect for a file.

    Returns:
        The files; none if there are no rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for table in _collected(tables, file_bytes):
        files.append(path.with_name(f"{path.name}-{len(files):04d}.arrow"))
        _write(table, files[-1], schema, digits.of_pass(number, buckets(table)), digits.base)
    return tuple(files)


def shuffle(
    written: Iterable[Scattered],
    directory: Path,
    schema: pa.Schema,
    buckets: Buckets,
    digits: Digits,
    map_tasks: MapTasks,
) -> list[Pieces]:
    """Run all passes after the first, and return the pieces of each bucket.

    Each pass deletes the files that it has read.

    Args:
        written: Files of the first pass.
        directory: Directory for the files of this shuffle; the first pass wrote below it.
        schema: Schema of the rows.
        buckets: Function that returns the bucket of each row.
        digits: Number of passes and base of the digits.
        map_tasks: Function that runs the tasks.
    """
    reports = sorted(written, key=lambda report: report.index)
    ranges: list[tuple[Path, ...]] = [tuple(path for report in reports for path in report.files)]
    for number in range(2, digits.passes + 1):
        width = digits.base ** (digits.passes - number + 1)
        groups = [
            group
            for pieces in _pieces(ranges, -(-digits.buckets // width), digits.base)
            for group in _groups(pieces, digits.base)
        ]
        divide = functools.partial(
            _divide,
            directory=directory / f"pass-{number}",
            schema=schema,
            buckets=buckets,
            digits=digits,
            number=number,
        )
        found: list[list[Scattered]] = [[] for _ in range(-(-digits.buckets // width))]
        for report in map_tasks(divide, list(enumerate(groups))):
            found[groups[report.index].index].append(report)
        old = {path.parent for files in ranges for path in files}
        ranges = [
            tuple(path for report in sorted(each, key=lambda report: report.index) for path in report.files)
            for each in found
        ]
        for folder in old:
            shutil.rmtree(folder, ignore_errors=True)  # it may exist on another machine only
    return _pieces(ranges, digits.buckets, digits.base)


def read_pieces(pieces: Pieces, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a bucket, in the order of the files."""
    names = schema.names if columns is None else columns
    batches: list[pa.RecordBatch] = []
    for path in pieces.files:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as written:
            batch = written.get_batch(pieces.batch)
        if len(batch):
            batches.append(batch.select(names))
    return pa.Table.from_batches(batches, schema=pa.schema([schema.field(name) for name in names]))


def _pieces(ranges: Sequence[tuple[Path, ...]], count: int, base: int) -> list[Pieces]:
    return [Pieces(index, ranges[index // base], index % base) for index in range(count)]


def _groups(pieces: Pieces, size: int) -> Iterator[Pieces]:
    for start in range(0, len(pieces.files), size):
        yield dataclasses.replace(pieces, files=pieces.files[start : start + size])


def _divide(
    task: tuple[int, Pieces], directory: Path, schema: pa.Schema, buckets: Buckets, digits: Digits, number: int
) -> Scattered:
    """Divide the rows of a range of buckets by the next digit of their bucket's number."""
    index, pieces = task
    rows = (read_pieces(dataclasses.replace(pieces, files=(path,)), schema) for path in pieces.files)
    path = directory / f"range-{pieces.index:06d}-{index:06d}"
    return Scattered(index, scatter(rows, path, schema, buckets, digits, number=number))


def _collected(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Yield the rows in tables of about `size` bytes, none of them empty."""
    held: list[pa.Table] = []
    filled = 0
    for table in tables:
        if not len(table):
            continue
        held.append(table)
        filled += table.nbytes
        if filled >= size:
            yield _concatenated(held)
            held, filled = [], 0
    if held:
        yield _concatenated(held)


def _concatenated(tables: list[pa.Table]) -> pa.Table:
    found = pa.concat_tables(tables)
    tables.clear()
    return found.combine_chunks()


def _write(table: pa.Table, path: Path, schema: pa.Schema, digits: NDArray[np.int64], base: int) -> None:
    # Each attempt writes to its own draft: if a node loses its network, its attempt and a second one may run at the
    # same time.
    draft = path.with_suffix(f".{uuid.uuid4().hex}")
    order = np.argsort(digits, kind="stable")
    edges = np.searchsorted(digits[order], np.arange(base + 1))
    with pa.OSFile(str(draft), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        for start, stop in itertools.pairwise(edges):
            file.write_batch(_batch(table.take(pa.array(order[start:stop]))))
    draft.replace(path)


def _batch(table: pa.Table) -> Any:
    return pa.record_batch([column.combine_chunks() for column in table.columns], schema=table.schema)
