"""Which of several figures is the lowest, its bounds, and how often chance would give the same order."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

TAIL = 0.05
"""Of the draws, on either side of an interval: it holds nine of ten."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """One figure among others.

    Attributes:
        value: Of the fitted curves; infinity for what is not to be had.
        interval: That holds nine of ten draws, as far as it goes; None where there are no draws.
        best_in: Share of the draws in which it is the lowest; None likewise.
    """

    value: float
    interval: tuple[float, float] | None
    best_in: float | None


def rank(values: Sequence[float], draws: Sequence[Sequence[float]]) -> list[Rank]:
    """Judge each figure.

    Args:
        values: One per candidate, the lower the better.
        draws: As they could have come out as well.
    """
    if not draws:
        return [Rank(value, None, None) for value in values]
    winners = [min(range(len(values)), key=draw.__getitem__) if math.isfinite(min(draw)) else None for draw in draws]
    return [
        Rank(value, _interval(sorted(draw[i] for draw in draws)), winners.count(i) / len(draws)) for i, value in enumerate(values)]


def _interval(ordered: Sequence[float]) -> tuple[float, float]:
    last = len(ordered) - 1
    return ordered[math.floor(TAIL * last)], ordered[math.ceil((1 - TAIL) * last)]
