"""Tables of documents that an engine reads, maps and brings together, in this process or on Ray Data.

The engine on Ray Data is in `execution.ray.tables`.

All functions are pure functions of tables, and what they return must not depend on how rows are divided into tables.
Where a function needs all rows with a key at once, the rows are grouped first.
"""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa

from moedisco_ray.core.limits import HELD_BYTES

R = TypeVar("R")
U = TypeVar("U")

RANGE = "range"
"""Column by which rows are brought together."""

MapTable = Callable[[pa.Table], Iterable[pa.Table]]
"""Picklable function of a table."""


class Tables(Protocol):
    """Rows in any number of tables."""

    def map(self, function: MapTable) -> Tables:
        """The rows that a function returns for each table; it is called anew whenever they are used."""

    def grouped(self, count: int) -> Tables:
        """The rows, with all rows of a value of the column `range` in one table, computed now and kept.

        Args:
            count: Number of values.
        """

    def collected(self, schema: pa.Schema) -> pa.Table:
        """All rows on this machine, in any order; only for a few small rows."""

    def written(self, function: Callable[[pa.Table], Iterable[R]]) -> list[R]:
        """Call a function that writes a table, and return all that the calls return, in any order."""


class Engine(Protocol):
    """Reads documents into tables."""

    def __call__(
        self,
        units: Sequence[U],
        read: Callable[[U], Iterable[pa.Table]],
        here: Sequence[pa.Table] = (),
        size: int | None = None,
    ) -> Tables:
        """Read documents.

        Args:
            units: Picklable descriptions of parts of the text.
            read: Picklable function that yields the tables of a unit.
            here: Tables that this process has read already.
            size: Size of the units' text (bytes), if it is known.
        """


@dataclasses.dataclass(frozen=True)
class InProcess:
    """Tables in this process. Rows that are brought together are kept in memory up to 128 MB, and on disk beyond.

    Attributes:
        tables: Returns the tables.
        scratch: Directory for files of rows; made when absent.
    """

    tables: Callable[[], Iterable[pa.Table]]
    scratch: Path

    def map(self, function: MapTable) -> InProcess:
        """Call the function for one table after the other."""
        return dataclasses.replace(self, tables=lambda: itertools.chain.from_iterable(map(function, self.tables())))

    def grouped(self, count: int) -> InProcess:
        """Divide the rows, and join the parts of each range."""
        files: list[Path] = []
        held: list[pa.Table] = []
        filled = 0
        for table in self.tables():
            held.append(table)
            filled += table.nbytes
            if filled >= HELD_BYTES:
                files.append(_write_ranges(_joined(held), count, self.scratch / f"{uuid.uuid4().hex}.arrow"))
                filled = 0
        rest = dict(divided(_joined(held))) if held else {}

        def tables() -> Iterator[pa.Table]:
            for number in range(count):
                parts = [*(_read_range(path, number) for path in files), *([rest[number]] if number in rest else [])]
                if table := pa.concat_tables(parts).combine_chunks() if parts else None:
                    yield table

        return dataclasses.replace(self, tables=tables)

    def collected(self, schema: pa.Schema) -> pa.Table:
        """All rows."""
        return pa.concat_tables([schema.empty_table(), *self.tables()])

    def written(self, function: Callable[[pa.Table], Iterable[R]]) -> list[R]:
        """Write one table after the other."""
        return list(itertools.chain.from_iterable(map(function, self.tables())))


def in_process(scratch: Path) -> Engine:
    """An `Engine` that reads one unit after the other in this process.

    Args:
        scratch: Directory for files of rows.
    """

    def read_all(
        units: Sequence[U],
        read: Callable[[U], Iterable[pa.Table]],
        here: Sequence[pa.Table] = (),
        size: int | None = None,
    ) -> InProcess:
        del size
        return InProcess(lambda: itertools.chain(here, itertools.chain.from_iterable(map(read, units))), scratch)

    return read_all


def _joined(tables: list[pa.Table]) -> pa.Table:
    found = pa.concat_tables(tables)
    tables.clear()
    return found


def _write_ranges(table: pa.Table, count: int, path: Path) -> Path:
    """Write rows to a file in which record batch i holds the rows of range i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = dict(divided(table))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        for number in range(count):
            columns = [column.combine_chunks() for column in parts.get(number, table.schema.empty_table()).columns]
            file.write_batch(pa.record_batch(columns, schema=table.schema))
    return path


def _read_range(path: Path, number: int) -> pa.Table:
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
        return pa.Table.from_batches([file.get_batch(number)])


def divided(table: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each value of the column `range`, in their order."""
    values = table[RANGE].to_numpy()
    order = np.argsort(values, kind="stable")
    is_ordered = bool(np.all(values[:-1] <= values[1:]))  # then no copy of the text is needed
    ordered = table if is_ordered else table.take(pa.array(order))
    numbers, starts = np.unique(values[order], return_index=True)
    for number, (start, stop) in zip(numbers.tolist(), itertools.pairwise([*starts, len(values)]), strict=True):
        yield number, ordered.slice(start, stop - start)
