"""Means over the same subjects of recipes that were not all measured in the same ones.

In some subjects every recipe seems better, and one that was measured in these alone is not better for that. So a figure is taken
to be its recipe's level and its subject's shift together, fitted by least squares (a two-way layout with cells missing). Where no
cell is missing, two recipes then differ by the mean of their pairs; where two share no subject, by way of those that they share
with others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

_UNDRAWN = 1e-4
"""Weight of a subject that was not drawn: it decides only what no other subject does."""
_LOOSE = 1e-9
"""Weight of a shift of 0: it decides between subjects that no chain of recipes links, and nothing else."""


def shifts(rows: Sequence[Mapping[int, float]], chosen: Sequence[int], subjects: int) -> list[float]:
    """By how much each subject moves the figures of all recipes.

    Their mean is 0, and so is that of every group of subjects that shares no recipe with the others.

    Args:
        rows: Each recipe's figures by subject. Infinite ones are passed over.
        chosen: Which subjects count, as often as they are named.
        subjects: How many there are.
    """
    weights = [chosen.count(at) or _UNDRAWN for at in range(subjects)]
    matrix = [[_LOOSE if i == j else 0.0 for j in range(subjects)] for i in range(subjects)]
    right = [0.0] * subjects
    for row in rows:
        figures = {at: figure for at, figure in row.items() if math.isfinite(figure)}
        total = sum(weights[at] for at in figures)
        # The level that fits best is the mean of what the shifts leave: without it, the shifts are all that is sought.
        for at, figure in figures.items():
            matrix[at][at] += weights[at]
            for beside, other in figures.items():
                share = weights[at] * weights[beside] / total
                matrix[at][beside] -= share
                right[at] += share * (figure - other)
    return _solution(matrix, right)


def mean(row: Mapping[int, float], moved: Sequence[float], chosen: Sequence[int]) -> float:
    """A recipe's figure over all chosen subjects, with those in which it was not measured as if it had been.

    Args:
        row: Its figures by subject; if none of these is chosen, all count.
        moved: The `shifts`.
        chosen: Which subjects count, as often as they are named.
    """
    where = [at for at in chosen if at in row] or list(row)
    return statistics.fmean(row[at] - moved[at] for at in where) + statistics.fmean(moved[at] for at in chosen)


def _solution(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Of linear equations with a positive definite matrix, which needs no pivoting (Gauss and Jordan)."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i, pivot in enumerate(rows):
        for row in rows[:i] + rows[i + 1:]:
            factor = row[i] / pivot[i]
            row[i:] = [a - factor * b for a, b in zip(row[i:], pivot[i:], strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(rows)]
