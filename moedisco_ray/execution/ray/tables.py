"""Tables of documents on Ray Data, which reads, maps, shuffles and writes them on all nodes with CPUs.

What Ray Data 2.60 does with these operators:

- A shuffle by a key (`repartition(keys=...)`) returns whole partitions as blocks, which no later operator divides if it
  takes whole blocks (`batch_size=None`).
- Its map tasks collect blocks up to `shuffle_input_batch_bytes`; with the default of 1 GiB, a corpus of that size has a
  single one, which begins when all text has been read.
- A map passes blocks without rows on as they are, with the schema of its input. So they are removed after each shuffle.
- Its shuffles take whole CPUs on any node, so the text of a data owner cannot be shuffled on the owner's nodes alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, Dataset, Datasink, Datasource, ReadTask
from ray.data.block import BlockMetadata

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_work import movable
from moedisco_ray.stages.tables import RANGE, MapTable

R = TypeVar("R")
U = TypeVar("U")

_LEAST_READ_BYTES = 2 << 20
"""Minimum size of the text that a task reads (bytes), unless it is all there is: a task costs as much as reading it."""
_BLOCK_BYTES = 128 << 20
"""Target size of the blocks that are read (bytes)."""
_SHUFFLED_BYTES = 128 << 20
"""Size of the blocks that a task of a shuffle divides at once (bytes); it needs twice this memory."""
_UNDIVIDED_BYTES = 1 << 30
"""Target size of the blocks that are written (bytes): larger than a range of ids, which is written as a whole."""


@dataclasses.dataclass(frozen=True)
class RayEngine:
    """A `stages.tables.Engine` on the connected Ray cluster.

    Attributes:
        name: Name of the data sets in Ray's dashboard.
        store: The run.
        blocks: Number of tasks that read; by default, one per unit, or fewer for little text. The result is the same.
    """

    name: str
    store: RunStore
    blocks: int | None = None

    def __call__(
        self,
        units: Sequence[U],
        read: Callable[[U], Iterable[pa.Table]],
        here: Sequence[pa.Table] = (),
        size: int | None = None,
    ) -> RayTables:
        """The tables of all units, which are read whenever they are used."""
        return RayTables(self, functools.partial(self._read, units, read, here, size))

    def _read(
        self, units: Sequence[U], read: Callable[[U], Iterable[pa.Table]], here: Sequence[pa.Table], size: int | None
    ) -> Dataset:
        sources = [ray.data.from_arrow(list(here))] if here else []
        if units:
            source = _Documents(units, read, self.store, size)
            most = len(units) if size is None else max(1, size // _LEAST_READ_BYTES)
            sources.append(ray.data.read_datasource(source, override_num_blocks=self.blocks or min(most, len(units))))
        first, *others = sources
        return first.union(*others) if others else first


@dataclasses.dataclass(frozen=True)
class RayTables:
    """Implements `stages.tables.Tables`: a data set, and the functions that are mapped over it.

    Attributes:
        engine: The engine that runs the functions.
        source: Returns the data set.
        functions: Functions to apply, in order.
    """

    engine: RayEngine
    source: Callable[[], Dataset]
    functions: tuple[MapTable, ...] = ()

    def map(self, function: MapTable) -> RayTables:
        """The rows that the function returns for each block."""
        return dataclasses.replace(self, functions=(*self.functions, function))

    def grouped(self, count: int) -> RayTables:
        """The rows in blocks of whole ranges, in Ray's object stores."""
        with _unwrapped():
            shuffled = self._data_set(_BLOCK_BYTES).repartition(count, keys=[RANGE])
            bundles = list(shuffled.materialize().iter_internal_ref_bundles())
        blocks = [entry.ref for bundle in bundles for entry in bundle.blocks if entry.metadata.num_rows]
        # Made once, since it asks for each block's schema in a task. What follows keeps its options: ranges stay whole.
        with DataContext.current(_context(_UNDIVIDED_BYTES)):
            data = ray.data.from_arrow_refs(blocks)
        return RayTables(self.engine, lambda: data)

    def collected(self, schema: pa.Schema) -> pa.Table:
        """All rows, on the driver."""
        with _unwrapped():
            found = ray.get(self._data_set(_BLOCK_BYTES).to_arrow_refs())
        return pa.concat_tables([schema.empty_table(), *(table.cast(schema) for table in found if len(table))])

    def written(self, function: Callable[[pa.Table], Iterable[R]]) -> list[R]:
        """Write every block in a task of its own."""
        sink: _Parts[R] = _Parts(movable(self.engine.store, function))
        with _unwrapped():
            self._data_set(_UNDIVIDED_BYTES).write_datasink(sink)
        return sink.returned

    def _data_set(self, block_bytes: int) -> Dataset:
        with DataContext.current(_context(block_bytes)):
            data = self.source()
            for function in self.functions:
                moved = movable(self.engine.store, function)
                data = data.map_batches(moved, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
        data.set_name(self.engine.name)
        return data


def _context(block_bytes: int) -> DataContext:
    """Ray Data's options of a data set, which those that are made from it keep."""
    context = DataContext.get_current().copy()
    context.target_max_block_size = block_bytes
    context.shuffle_input_batch_bytes = _SHUFFLED_BYTES
    context.shuffle_compression = "lz4"
    return context


class _Documents(Datasource):
    """Documents; a task reads one unit or more, and yields tables as it reads."""

    def __init__(
        self, units: Sequence[Any], read: Callable[[Any], Iterable[pa.Table]], store: RunStore, size: int | None
    ) -> None:
        super().__init__()
        self._units, self._read, self._store, self._size = units, read, store, size

    def estimate_inmemory_data_size(self) -> int | None:
        return self._size

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,  # noqa: ARG002 - Ray Data's signature
        data_context: DataContext | None = None,  # noqa: ARG002 - the same
    ) -> list[ReadTask]:
        count = min(parallelism, len(self._units))
        edges = [len(self._units) * i // count for i in range(count + 1)]
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(movable(self._store, _ReadAll(tuple(self._units[start:stop]), self._read)), unknown)
            for start, stop in itertools.pairwise(edges)
        ]


@dataclasses.dataclass(frozen=True)
class _ReadAll:
    units: tuple[Any, ...]
    read: Callable[[Any], Iterable[pa.Table]]

    def __call__(self) -> Iterator[pa.Table]:
        for unit in self.units:
            yield from self.read(unit)


class _Parts(Datasink[list[R]]):
    """Parts of the corpus."""

    def __init__(self, function: Callable[[pa.Table], Iterable[R]]) -> None:
        self._function = function
        self.returned: list[R] = []

    def write(self, blocks: Iterable[pa.Table], ctx: Any) -> list[R]:  # noqa: ARG002 - Ray Data's signature
        tables = [block for block in blocks if len(block)]
        return list(self._function(pa.concat_tables(tables))) if tables else []

    def on_write_complete(self, write_result: Any) -> None:
        self.returned = [found for each in write_result.write_returns for found in each]


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise an error of this package or of the system that a task has raised as itself, without Ray's frames."""
    try:
        yield
    except Exception as error:
        if (found := _cause(error)) is None:
            raise
        raise found from None


def _cause(error: BaseException | None) -> MoeDiscoError | OSError | None:
    """The error in a task that is behind an error of Ray, if users can read it."""
    while error is not None:
        # First, since an error of Ray is also an instance of the class of its cause.
        if (cause := getattr(error, "cause", None)) is not None:
            error = cause
        elif isinstance(error, (MoeDiscoError, OSError)):
            return error
        else:
            error = error.__cause__
    return None
