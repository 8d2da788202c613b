"""Combine a range of the members' weights, read the combined weights, and write them as a model.

A range is read piece by piece from the files of all members, so neither memory nor time depends on their number.

Shape: N elements of the weights, laid end to end.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from moedisco_ray.core.config import Outer
from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.core.store.manifests import MEMBERS
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.written import writing
from moedisco_ray.models import write_checkpoint
from moedisco_ray.policies.sync_points import range_bounds, token_weights
from moedisco_ray.training.sync.files import COMMON, LAYOUT, MOMENTUM, RangeReader, Roster, SyncPoint
from moedisco_ray.training.sync.layout import Layout, as_bytes
from moedisco_ray.training.sync.outer_step import outer_step

T = TypeVar("T")

_AHEAD = 8
"""Number of pieces that are read ahead, in as many threads; they take 32 MiB. An object store answers each after tens
of milliseconds."""


def combine(
    point: SyncPoint,
    place: int,
    roster: Roster,
    layout: Layout,
    start: Mapping[str, Tensor],
    outer: Outer,
    config: Mapping[str, Any],
) -> dict[str, Entry]:
    """Combine a range of the weights by an outer step, and store it; any number of processes may do so.

    Args:
        point: The sync point.
        place: Number of the range.
        roster: The members to combine.
        layout: Layout of a member's weights.
        start: Start model of all members, read at sync point 1.
        outer: Settings of the outer step.
        config: The `config.json` of the members' model.

    Returns:
        Entries of the files that are stored.

    Raises:
        DamagedError: What a member or the last sync point has written is damaged.
        RunDirError: The disk is full.
    """
    first, last = range_bounds(layout.elements, roster.ranges)[place]
    shares = token_weights([each.tokens for each in roster.members])
    copies = [
        RangeReader(point, f"{MEMBERS}/{each.name}.bin", layout.offset(first), Entry(*each.ranges[place]))
        for each in roster.members
    ]
    combined = {} if point.number == 1 else point.previous.combined()
    before = [
        RangeReader(point.previous, _file(kind, place), 0, combined[_file(kind, place)])
        for kind in (COMMON, MOMENTUM)
        if combined
    ]
    segments = list(layout.segments(first, last))

    def reads() -> Iterator[Callable[[], Tensor]]:
        for segment in segments:
            count = segment.stop - segment.start
            for each in before:
                yield functools.partial(each.read, 4 * (segment.start - first), torch.empty(count, dtype=torch.float32))
            offset = layout.offset(segment.start) - layout.offset(first)
            for each in copies:
                yield functools.partial(each.read, offset, torch.empty(count, dtype=segment.dtype))

    with (
        writing(point.store, point.path(_file(COMMON, place))) as common_file,
        writing(point.store, point.path(_file(MOMENTUM, place))) as momentum_file,
        ThreadPoolExecutor(_AHEAD, thread_name_prefix="combine") as threads,
    ):
        common, momentum, pieces = _Counting(common_file), _Counting(momentum_file), _ahead(reads(), threads)
        for segment in segments:
            earlier = [reader.count(next(pieces)) for reader in before]
            start_N = earlier[0] if earlier else layout.read(start, segment)
            moved = (reader.count(piece) for reader, piece in zip(copies, pieces, strict=False))
            for file, result_N in zip(
                (common, momentum),
                outer_step(start_N, moved, shares, earlier[1] if earlier else None, outer),
                strict=True,
            ):
                file.write(result_N)
        for reader in (*before, *copies):
            reader.check()
    files = {_file(COMMON, place): common.entry, _file(MOMENTUM, place): momentum.entry}
    if not place:
        files[LAYOUT] = point.write(LAYOUT, {"config": dict(config), "shapes": layout.shapes})
    return files


def common_tensors(point: SyncPoint) -> Iterator[tuple[str, Tensor]]:
    """The common weights of a completed sync point, in float32, tensor by tensor; all are verified at the end.

    Raises:
        DamagedError: They are damaged.
    """
    files = point.combined()
    layout = Layout.parse(point.read(LAYOUT)["shapes"])
    yield from layout.unflattened(_common_segments(point, layout, files))


def write_common(directory: Path, number: int, target: Path, store: RunStore, stage: str) -> None:
    """Write the common weights of a completed sync point as a model directory; only the last two exist."""
    point = SyncPoint(directory, number, store, stage)
    written = point.read(LAYOUT)
    layout = Layout.parse(written["shapes"]).tensors
    write_checkpoint(target, common_tensors(point), written["config"], layout=layout)


def _common_segments(point: SyncPoint, layout: Layout, files: Mapping[str, Entry]) -> Iterator[Tensor]:
    places = list(itertools.takewhile(lambda place: _file(COMMON, place) in files, itertools.count()))
    bounds = range_bounds(layout.elements, len(places))
    readers = [RangeReader(point, _file(COMMON, place), 0, files[_file(COMMON, place)]) for place in places]
    pieces = [
        (reader, segment.stop - segment.start, 4 * (segment.start - first))
        for reader, (first, last) in zip(readers, bounds, strict=True)
        for segment in layout.segments(first, last)
    ]
    calls = (functools.partial(reader.read, offset, torch.empty(size)) for reader, size, offset in pieces)
    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="common") as threads:
        for (reader, _, _), piece_N in zip(pieces, _ahead(calls, threads), strict=True):
            yield reader.count(piece_N)
    for reader in readers:
        reader.check()


class _Counting:
    """Writes tensors to a file, and counts its size and SHA-256."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, tensor: Tensor) -> None:
        data = as_bytes(tensor)
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    @property
    def entry(self) -> Entry:
        return Entry(self._size, self._digest.hexdigest())


def _ahead(calls: Iterable[Callable[[], T]], threads: ThreadPoolExecutor) -> Iterator[T]:
    """Results of calls, in order; threads make some of them ahead."""
    pending: collections.deque[Future[T]] = collections.deque()
    for call in calls:
        pending.append(threads.submit(call))
        if len(pending) > _AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _file(kind: str, place: int) -> str:
    return f"{kind}/{place:04d}.bin"
