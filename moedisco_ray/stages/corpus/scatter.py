"""Divide the rows that many tasks write among many tasks that read them, through files.

A writing task writes one Arrow file for any number of buckets. Each record batch in it holds rows of one bucket. The task returns
the bucket of each batch, so that a reading task reads only the batches of its bucket.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Scattered:
    """A written file.

    Attributes:
        index: Number of the task that wrote the file.
        path: The Arrow file.
        batches: Bucket of each record batch in the file.
    """

    index: int
    path: Path
    batches: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """All rows of one bucket.

    Attributes:
        index: Number of the bucket.
        files: Files with rows of the bucket, each with the positions of the record batches that hold them.
    """

    index: int
    files: tuple[tuple[Path, tuple[int, ...]], ...]


class Scatterer:
    """Context manager that writes a file of rows by bucket. A second attempt replaces the file by one with the same bytes.

    Attributes:
        batches: Bucket of each record batch so far.

    Args:
        path: File to write.
        schema: Schema of the rows.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.batches: list[int] = []
        self._path = path
        self._schema = schema
        # Each attempt writes to its own draft: if a node loses its network, its attempt and a second one may run at the same time.
        self._draft = path.with_suffix(f".{uuid.uuid4().hex}")
        self._files = contextlib.ExitStack()
        self._writer: Any = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        sink = self._files.enter_context(pa.OSFile(str(self._draft), "wb"))
        self._writer = self._files.enter_context(pa.ipc.new_file(sink, self._schema))
        return self

    def write(self, table: pa.Table, buckets: NDArray[np.int64]) -> None:
        """Write rows; `buckets` is the bucket of each."""
        order = np.argsort(buckets, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(buckets[order])) + 1):
            self.batches.append(int(buckets[rows[0]]))
            self._writer.write_batch(table.take(pa.array(rows)).combine_chunks().to_batches()[0])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.close()
        if error is None:
            self._draft.replace(self._path)


def gather(written: Iterable[Scattered], count: int) -> list[Pieces]:
    """The pieces of each bucket, in the order of the tasks that wrote them."""
    files: list[list[tuple[Path, tuple[int, ...]]]] = [[] for _ in range(count)]
    for report in sorted(written, key=lambda report: report.index):
        positions: dict[int, list[int]] = {}
        for position, bucket in enumerate(report.batches):
            positions.setdefault(bucket, []).append(position)
        for bucket, batches in positions.items():
            files[bucket].append((report.path, tuple(batches)))
    return [Pieces(index, tuple(found)) for index, found in enumerate(files)]


def read_pieces(pieces: Pieces, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a bucket, in the order of the files."""
    names = schema.names if columns is None else columns
    batches: list[pa.RecordBatch] = []
    for path, positions in pieces.files:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as written:
            batches += [written.get_batch(position).select(names) for position in positions]
    return pa.Table.from_batches(batches, schema=pa.schema([schema.field(name) for name in names]))
