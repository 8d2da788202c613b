"""Combine a range of the members' weights, read the combined weights, and write them as a model.

A range is read piece by piece from the files of all members, so neither memory nor time depends on their number.

Shape: N elements of the weights, laid end to end.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedisco_ray.core.config import Outer
from moedisco_ray.core.limits import SYNC_AHEAD
from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.core.store.manifests import MEMBERS
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.written import writing
from moedisco_ray.models import write_checkpoint
from moedisco_ray.policies.sync_points import range_bounds, token_weights
from moedisco_ray.training.sync.files import COMMON, LAYOUT, MOMENTUM, RangeReader, Roster, SyncPoint
from moedisco_ray.training.sync.layout import Layout
from moedisco_ray.training.sync.outer_step import outer_step
from moedisco_ray.training.sync.pieces import Counting, ahead, range_file


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
        RangeReader(point.previous, range_file(kind, place), 0, combined[range_file(kind, place)])
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
        writing(point.store, point.path(range_file(COMMON, place))) as common_file,
        writing(point.store, point.path(range_file(MOMENTUM, place))) as momentum_file,
        ThreadPoolExecutor(SYNC_AHEAD, thread_name_prefix="combine") as threads,
    ):
        common, momentum, pieces = Counting(common_file), Counting(momentum_file), ahead(reads(), threads)
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
    files = {range_file(COMMON, place): common.entry, range_file(MOMENTUM, place): momentum.entry}
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
    names = itertools.takewhile(files.__contains__, (range_file(COMMON, place) for place in itertools.count()))
    readers = [RangeReader(point, name, 0, files[name]) for name in names]
    # A range may begin at blocks only; see `coded`.
    bounds = itertools.pairwise(itertools.accumulate((reader.size // 4 for reader in readers), initial=0))
    pieces = [
        (reader, segment.stop - segment.start, 4 * (segment.start - first))
        for reader, (first, last) in zip(readers, bounds, strict=True)
        for segment in layout.segments(first, last)
    ]
    calls = (functools.partial(reader.read, offset, torch.empty(size)) for reader, size, offset in pieces)
    with ThreadPoolExecutor(SYNC_AHEAD, thread_name_prefix="common") as threads:
        for (reader, _, _), piece_N in zip(pieces, ahead(calls, threads), strict=True):
            yield reader.count(piece_N)
    for reader in readers:
        reader.check()
