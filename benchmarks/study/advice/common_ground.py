"""Compares recipes that were measured on different subjects (models and texts).

On some subjects every recipe seems better, and a recipe that was measured only on these must not gain from that. Each figure is
therefore modelled as the sum of a recipe's level and a subject's shift, fitted by least squares (a two-way layout with missing
cells). Without missing cells, the difference of two recipes is the mean of their differences on each subject. Two recipes without
a common subject are compared through other recipes that share subjects with both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

_UNDRAWN = 1e-4
"""Weight of a subject that was not drawn: it matters only if no drawn subject decides."""
_LOOSE = 1e-9
"""Weight that pulls shifts to 0: it matters only between subjects that no chain of recipes links."""


def shifts(rows: Sequence[Mapping[int, float]], chosen: Sequence[int], subjects: int) -> list[float]:
    """Shift of each subject: the amount that it adds to the figures of all recipes.

    The mean shift is 0, overall and in every group of subjects that shares no recipe with the others.

    Args:
        rows: Figures by subject, for each recipe; infinite figures are skipped.
        chosen: Subjects to use; each counts once for every time it is listed.
        subjects: Number of subjects.
    """
    weights = [chosen.count(at) or _UNDRAWN for at in range(subjects)]
    matrix = [[_LOOSE if i == j else 0.0 for j in range(subjects)] for i in range(subjects)]
    right = [0.0] * subjects
    for row in rows:
        figures = {at: figure for at, figure in row.items() if math.isfinite(figure)}
        total = sum(weights[at] for at in figures)
        # The best level is the mean of the figures minus the shifts; inserting it leaves only the shifts to solve for.
        for at, figure in figures.items():
            matrix[at][at] += weights[at]
            for neighbour, other in figures.items():
                share = weights[at] * weights[neighbour] / total
                matrix[at][neighbour] -= share
                right[at] += share * (figure - other)
    return _solution(matrix, right)


def mean(row: Mapping[int, float], moved: Sequence[float], chosen: Sequence[int]) -> float:
    """A recipe's mean figure over all chosen subjects, estimated for those on which it was not measured.

    Args:
        row: The recipe's figures by subject; if none of its subjects is chosen, all are used.
        moved: Result of `shifts`.
        chosen: Subjects to use; each counts once for every time it is listed.
    """
    where = [at for at in chosen if at in row] or list(row)
    return statistics.fmean(row[at] - moved[at] for at in where) + statistics.fmean(moved[at] for at in chosen)


def _solution(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Solve linear equations with a positive definite matrix by Gauss-Jordan elimination, which then needs no pivoting."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i, pivot in enumerate(rows):
        for row in rows[:i] + rows[i + 1:]:
            factor = row[i] / pivot[i]
            row[i:] = [a - factor * b for a, b in zip(row[i:], pivot[i:], strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(rows)]
