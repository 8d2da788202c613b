"""Sync points at which members exchange changes of their weights in 4 bits, in both directions.

From common weights g, member k has trained theta_k, and has lost r_k in the codes of earlier sync points:

    it publishes the codes of v_k = (g - theta_k) + r_k, and keeps r_k' = v_k - decoded v_k.

The member that combines a range makes the outer step on the decoded v_k, as on exact deltas. Of the exact update u and
of f, what the codes of earlier updates have lost,

    it publishes the codes of u + f, the common weights g' = g + decoded (u + f), and f' = (g + u + f) - g'.

A member that holds g adds the decoded update; one that does not, because it is new or was late or restarted, reads g'.
Both have the same bits, since both are the same sum in float32. Over all sync points, what members apply differs from
the exact updates by the last f alone, and what is combined of a member from its exact deltas by its last r_k.

Codes have blocks, which are counted from the first element of all weights, and ranges begin at blocks. So the codes do
not depend on the number of ranges, nor on who computes them. A block may hold the end of a tensor and the beginning of
the next one; the larger values then decide its scale, and the residual makes up for what the smaller ones lose.

r_k is part of a member's checkpoints. It changes when the common weights of a sync point are loaded, and is computed
then from what the checkpoint before that sync point holds: a member that is restarted gets the same bits, wherever it
died. The change that a late member has made is lost, and its residual with it: it begins again at 0.

Shape: N elements of the weights, laid end to end.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from moedisco_ray.core.config import Outer
from moedisco_ray.core.limits import SYNC_AHEAD, SYNC_ELEMENTS
from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.core.store.manifests import MEMBERS
from moedisco_ray.core.store.written import writing
from moedisco_ray.policies.sync_points import BLOCK, Arrival, coded_bytes, range_bounds, token_weights
from moedisco_ray.training.sync.codec import decode, encode
from moedisco_ray.training.sync.combine import common_tensors
from moedisco_ray.training.sync.files import COMMON, LAYOUT, MOMENTUM, RESIDUAL, UPDATE, RangeReader, Roster, SyncPoint
from moedisco_ray.training.sync.layout import Layout, as_bytes
from moedisco_ray.training.sync.outer_step import outer_update
from moedisco_ray.training.sync.pieces import Counting, ahead, range_file

Tensors = Mapping[str, Tensor]


class CodedWeights:
    """What a member keeps between two sync points in main memory: common weights, and what its codes have lost.

    Args:
        layout: Layout of the member's weights.
        start: Function that opens the start model of all members, which has the common weights before sync point 1.
    """

    def __init__(self, layout: Layout, start: Callable[[], Tensors]) -> None:
        self._layout, self._start = layout, start
        self.residual_N = torch.zeros(layout.elements)
        self._common_N, self._number = torch.empty(0), -1

    @property
    def saved(self) -> dict[str, Tensor]:
        """What belongs in the member's checkpoints; a checkpoint is loaded into these tensors."""
        return {"residual": self.residual_N}

    def publish(self, point: SyncPoint, name: str, tensors: Tensors, ranges: int, tokens: int) -> Arrival:
        """Publish the codes of what a member's weights have changed by, unless they are published already.

        Args:
            point: The sync point.
            name: Name of the member.
            tensors: Its weights, under canonical names.
            ranges: Number of ranges into which the weights are divided.
            tokens: Tokens that the member has trained on since it last loaded common weights.

        Raises:
            NoCodesError: A weight is not finite.
            RunDirError: The disk is full.
        """

        def pieces() -> Iterator[memoryview]:
            common_N = self.common(point.previous)
            for first, last in _chunks(0, self._layout.elements):
                yield as_bytes(encode(self._change(common_N, tensors, first, last)))

        sizes = [coded_bytes(last - first) for first, last in range_bounds(self._layout.elements, ranges, BLOCK)]
        return point.publish_bytes(name, pieces(), sizes, tokens)

    def load(self, point: SyncPoint, tensors: Tensors, *, took_part: bool) -> None:
        """Load the common weights of a completed sync point into a member's model.

        Args:
            point: The sync point.
            tensors: The member's weights, as it has published them if it took part.
            took_part: Whether the weights were combined.

        Raises:
            DamagedError: What was combined is damaged, or deleted because later sync points are complete.
        """
        if took_part:
            common_N = self.common(point.previous)
            for first, last in _chunks(0, self._layout.elements):
                change_N = self._change(common_N, tensors, first, last)
                self.residual_N[first:last] = change_N - decode(encode(change_N), last - first)
        else:
            self.residual_N.zero_()
        if self._number == point.number - 1:
            self._number = -1
            for first, update_N in _updates(point, self._layout.elements):
                self._common_N[first : first + len(update_N)] += update_N
            self._number = point.number
        common_N, position = self.common(point), 0
        for tensor in tensors.values():
            tensor.copy_(common_N[position : position + tensor.numel()].view(tensor.shape))
            position += tensor.numel()

    def common(self, point: SyncPoint) -> Tensor:
        """The common weights after a sync point, in float32, of shape [N]; they are read if others are in memory.

        Raises:
            DamagedError: They are damaged, or deleted because later sync points are complete.
        """
        if self._number != point.number:
            self._number, position = -1, 0
            if not len(self._common_N):
                self._common_N = torch.empty(self._layout.elements)
            for _, tensor in common_tensors(point) if point.number else self._start_tensors():
                self._common_N[position : position + tensor.numel()] = tensor.reshape(-1)
                position += tensor.numel()
            self._number = point.number
        return self._common_N

    def _start_tensors(self) -> Iterator[tuple[str, Tensor]]:
        start = self._start()
        for name in self._layout.tensors:
            yield name, start[name]

    def _change(self, common_N: Tensor, tensors: Tensors, first: int, last: int) -> Tensor:
        """The change v of a part of the weights; a member in bf16 has begun from common weights rounded to bf16."""
        parts, position = [], first
        for name, a, b in self._layout.pieces(first, last):
            own_N = tensors[name].reshape(-1)[a:b].cpu()
            parts.append(common_N[position : position + b - a].to(own_N.dtype).float() - own_N.float())
            position += b - a
        return torch.cat(parts) + self.residual_N[first:last]


def combine_coded(
    point: SyncPoint,
    place: int,
    roster: Roster,
    layout: Layout,
    common_N: Tensor,
    outer: Outer,
    config: Mapping[str, Any],
) -> dict[str, Entry]:
    """Combine a range of the changes by an outer step, and store it; any number of processes may do so.

    Args:
        point: The sync point.
        place: Number of the range.
        roster: The members to combine.
        layout: Layout of a member's weights.
        common_N: Common weights before this sync point.
        outer: Settings of the outer step.
        config: The `config.json` of the members' model.

    Returns:
        Entries of the files that are stored.

    Raises:
        DamagedError: What a member or the last sync point has written is damaged.
        NoCodesError: The update is not finite.
        RunDirError: The disk is full.
    """
    first, last = range_bounds(layout.elements, roster.ranges, BLOCK)[place]
    shares = token_weights([each.tokens for each in roster.members])
    changes = [
        RangeReader(point, f"{MEMBERS}/{each.name}.bin", coded_bytes(first), Entry(*each.ranges[place]))
        for each in roster.members
    ]
    kept = [RESIDUAL, *([MOMENTUM] if outer.momentum else [])]
    combined = {} if point.number == 1 else point.previous.combined()
    before = [
        RangeReader(point.previous, range_file(kind, place), 0, combined[range_file(kind, place)])
        for kind in kept
        if combined
    ]
    chunks = list(_chunks(first, last))

    def reads() -> Iterator[Callable[[], Tensor]]:
        for a, b in chunks:
            for each in before:
                yield functools.partial(each.read, 4 * (a - first), torch.empty(b - a))
            for each in changes:
                codes_C = torch.empty(coded_bytes(b - a), dtype=torch.uint8)
                yield functools.partial(each.read, coded_bytes(a - first), codes_C)

    with contextlib.ExitStack() as stack:
        files = {
            kind: Counting(stack.enter_context(writing(point.store, point.path(range_file(kind, place)))))
            for kind in (COMMON, UPDATE, *kept)
        }
        pieces = ahead(reads(), stack.enter_context(ThreadPoolExecutor(SYNC_AHEAD, thread_name_prefix="combine")))
        for a, b in chunks:
            earlier = {kind: torch.zeros(b - a) for kind in (RESIDUAL, MOMENTUM)}
            earlier |= {kind: reader.count(next(pieces)) for kind, reader in zip(kept, before, strict=False)}
            deltas = (decode(reader.count(next(pieces)), b - a) for reader in changes)
            update_N, momentum_N = outer_update(deltas, shares, earlier[MOMENTUM], outer)
            update_N += earlier[RESIDUAL].double()
            codes_C = encode(update_N.float())
            result_N = common_N[a:b] + decode(codes_C, b - a)
            residual_N = (common_N[a:b].double() + update_N - result_N.double()).float()
            made = {COMMON: result_N, UPDATE: codes_C, RESIDUAL: residual_N, MOMENTUM: momentum_N}
            for kind, file in files.items():
                file.write(made[kind])
        for reader in (*before, *changes):
            reader.check()
    entries = {range_file(kind, place): file.entry for kind, file in files.items()}
    if not place:
        entries[LAYOUT] = point.write(LAYOUT, {"config": dict(config), "shapes": layout.shapes})
    return entries


def _updates(point: SyncPoint, elements: int) -> Iterator[tuple[int, Tensor]]:
    """The decoded updates of a sync point, each with its first element; all are verified at the end."""
    files = point.combined()
    names = itertools.takewhile(files.__contains__, (range_file(UPDATE, place) for place in itertools.count()))
    readers = [RangeReader(point, name, 0, files[name]) for name in names]
    parts = [
        (reader, first, a, b)
        for reader, (first, last) in zip(readers, range_bounds(elements, len(readers), BLOCK), strict=True)
        for a, b in _chunks(first, last)
    ]
    calls = (
        functools.partial(reader.read, coded_bytes(a - first), torch.empty(coded_bytes(b - a), dtype=torch.uint8))
        for reader, first, a, b in parts
    )
    with ThreadPoolExecutor(SYNC_AHEAD, thread_name_prefix="update") as threads:
        for (reader, _, a, b), codes_C in zip(parts, ahead(calls, threads), strict=True):
            yield a, decode(reader.count(codes_C), b - a)
    for reader in readers:
        reader.check()


def _chunks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Divide a range that begins at a block into parts that begin at blocks."""
    for start in range(first, last, SYNC_ELEMENTS):
        yield start, min(start + SYNC_ELEMENTS, last)
