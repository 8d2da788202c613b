"""Fewer points of a curve, such that it looks the same: spikes and both ends survive."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def downsample(values: Sequence[float], most: int) -> list[int]:
    """Which points of a curve to keep.

    The points between the ends are cut into equal buckets, and the lowest and the highest of each stretch are kept.

    Args:
        values: The curve's values in order; finite.
        most: Keep at most so many; below 4, still the ends and the extremes.

    Returns:
        Indices in ascending order: the first, the last, the lowest and the highest point of the curve among them.
    """
    count = len(values)
    if count <= max(most, 4):
        return list(range(count))
    buckets = max(1, (most - 2) // 2)
    kept = {0, count - 1}
    for low, high in _spans(1, count - 2, buckets):
        stretch = range(low, high + 1)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(kept)


def _spans(first: int, last: int, count: int) -> list[tuple[int, int]]:
    """Cut the whole numbers from `first` to `last` into at most `count` buckets whose lengths differ by at most one.

    Returns:
        The first and the last number of each stretch.
    """
    length = last - first + 1
    count = min(count, length)
    cuts = [first + length * number // count for number in range(count + 1)] if count > 0 else []
    return [(low, high - 1) for low, high in itertools.pairwise(cuts)]
