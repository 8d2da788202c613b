"""Ranks figures, the lowest first, with intervals and the probability of each to be the lowest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

TAIL = 0.05
"""Share of the draws outside an interval, on each side: a 90 % interval."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """One figure among others.

    Attributes:
        value: Value from the fitted curves; infinity if not possible.
        interval: 90 % interval of the draws; None without draws.
        best_in: Share of the draws in which this figure is the lowest; None without draws.
    """

    value: float
    interval: tuple[float, float] | None
    best_in: float | None


def rank(values: Sequence[float], draws: Sequence[Sequence[float]]) -> list[Rank]:
    """Rank each figure among all.

    Args:
        values: One figure per candidate; lower is better.
        draws: Bootstrap samples of all figures.
    """
    if not draws:
        return [Rank(value, None, None) for value in values]
    winners = [min(range(len(values)), key=draw.__getitem__) if math.isfinite(min(draw)) else None for draw in draws]
    return [
        Rank(value, _interval(sorted(draw[i] for draw in draws)), winners.count(i) / len(draws)) for i, value in enumerate(values)]


def _interval(ordered: Sequence[float]) -> tuple[float, float]:
    last = len(ordered) - 1
    return ordered[math.floor(TAIL * last)], ordered[math.ceil((1 - TAIL) * last)]
