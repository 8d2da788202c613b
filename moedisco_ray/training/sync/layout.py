"""The weights that members exchange, laid end to end, so that any range of them can be read, combined and written.

Shape: N elements of the weights, laid end to end in the order of their canonical names.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moedisco_ray.core.limits import SYNC_ELEMENTS
from moedisco_ray.models import Stored


class Segment(NamedTuple):
    """Consecutive elements of one dtype.

    Attributes:
        start: Position of the first element.
        stop: Position after the last element.
        dtype: Dtype in which members store them.
    """

    start: int
    stop: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shape and dtype of each tensor, by canonical name, in order. Positions count elements."""

    tensors: Mapping[str, Stored]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of tensors in memory."""
        return cls({name: Stored(tuple(each.shape), each.dtype) for name, each in tensors.items()})

    @classmethod
    def parse(cls, shapes: Mapping[str, Iterable[int]]) -> Layout:
        """The layout of tensors in float32, from `shapes`."""
        return cls({name: Stored(tuple(shape), torch.float32) for name, shape in shapes.items()})

    @property
    def shapes(self) -> dict[str, list[int]]:
        """The shapes as JSON values."""
        return {name: list(stored.shape) for name, stored in self.tensors.items()}

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Position of each tensor's first element, and the number of all elements."""
        return [0, *itertools.accumulate(math.prod(stored.shape) for stored in self.tensors.values())]

    @functools.cached_property
    def _offsets(self) -> list[int]:
        """Byte at which each tensor begins, and the number of all bytes."""
        return [0, *itertools.accumulate(stored.nbytes for stored in self.tensors.values())]

    @functools.cached_property
    def _stored(self) -> list[tuple[str, Stored]]:
        return list(self.tensors.items())

    @property
    def elements(self) -> int:
        """Number of all elements."""
        return self._starts[-1]

    def offset(self, position: int) -> int:
        """Byte at which an element begins in the file of a member."""
        if position == self.elements:
            return self._offsets[-1]
        index = bisect.bisect_right(self._starts, position) - 1
        return self._offsets[index] + (position - self._starts[index]) * self._stored[index][1].dtype.itemsize

    def pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """The tensors in a range: name, and the first and last plus one of the tensor's elements that are in it."""
        index = max(0, bisect.bisect_right(self._starts, start) - 1)
        while index < len(self._stored) and self._starts[index] < stop:
            first, end = self._starts[index], self._starts[index + 1]
            if max(start, first) < min(stop, end):
                yield self._stored[index][0], max(start, first) - first, min(stop, end) - first
            index += 1

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """Divide a range into segments of one dtype and at most `SYNC_ELEMENTS` elements."""
        position = start
        by_dtype = itertools.groupby(self.pieces(start, stop), lambda piece: self.tensors[piece[0]].dtype)
        for dtype, pieces in by_dtype:
            end = position + sum(last - first for _, first, last in pieces)
            while position < end:
                yield Segment(position, min(position + SYNC_ELEMENTS, end), dtype)
                position = min(position + SYNC_ELEMENTS, end)

    def read(self, source: Mapping[str, Tensor], segment: Segment) -> Tensor:
        """A segment of given tensors, in float32."""
        parts = [source[name].reshape(-1)[a:b].float() for name, a, b in self.pieces(segment.start, segment.stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unflattened(self, segments: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors, by name, from all segments in order; takes the segments to their end."""
        left_N, rest = torch.empty(0), iter(segments)
        for name, stored in self._stored:
            whole_N, filled = torch.empty(math.prod(stored.shape), dtype=stored.dtype), 0
            while filled < len(whole_N):
                if not len(left_N):
                    left_N = next(rest)
                count = min(len(left_N), len(whole_N) - filled)
                whole_N[filled : filled + count] = left_N[:count]
                left_N, filled = left_N[count:], filled + count
            yield name, whole_N.reshape(stored.shape)
        for _ in rest:
            pass


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, on the CPU; it is copied only if it is elsewhere, or not contiguous."""
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
