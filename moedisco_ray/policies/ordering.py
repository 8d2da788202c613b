"""The order in which sub-models start, and the time that a queue of them takes.

The sub-model with the longest expected remaining time starts first, so that no long sub-model runs alone at the end. On
m equal slots this order takes at most 4/3 - 1/(3m) times as long as the best order (Graham, "Bounds on multiprocessing
timing anomalies", SIAM Journal on Applied Mathematics 17, 1969, theorem 2). With few units it can take some per cent
longer than the best order; exchanging pairs of units removes most of this difference.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import statistics
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Remaining:
    """The remaining work of a unit.

    Attributes:
        steps: Remaining optimizer steps.
        planned: Planned seconds per step. An error by the same factor for all units does not matter.
        measured: Last measured seconds per step; None if the unit never ran.
    """

    name: str
    steps: int
    planned: float
    measured: float | None = None


def calibration(units: Iterable[Remaining]) -> float:
    """Median ratio of measured to planned time per step; 1 without measurements.

    It corrects the plan for units without a measurement. Otherwise a plan that is too optimistic would make them seem
    shorter than units that have already run.
    """
    ratios = [unit.measured / unit.planned for unit in units if unit.measured is not None]
    return statistics.median(ratios) if ratios else 1.0


def expected_seconds(unit: Remaining, factor: float = 1.0) -> float:
    """Expected remaining seconds of a unit on one slot.

    Args:
        unit: Remaining work of the unit.
        factor: Correction of the planned time per step (`calibration`).
    """
    return unit.steps * (unit.planned * factor if unit.measured is None else unit.measured)


def longest_first(units: Sequence[Remaining], factor: float | None = None) -> list[Remaining]:
    """Units by expected remaining time, longest first; equal units keep their order.

    Args:
        units: Units that wait.
        factor: Factor that corrects the planned time per step, by default the `calibration` of these units.
    """
    known = calibration(units) if factor is None else factor
    return sorted(units, key=lambda unit: -expected_seconds(unit, known))


_FEW = 24
"""Maximum number of units for which pairs are exchanged: with more, one unit matters little and trying all pairs is
slow."""
_WORTH = 0.005
"""Minimum relative gain of an exchange: estimates are not more accurate than that."""


def soonest_done(
    units: Sequence[Remaining], running: Sequence[float], slots: int, factor: float | None = None
) -> list[Remaining]:
    """The order of `longest_first`, improved by exchanging pairs of units while this makes the last unit end earlier.

    Args:
        units: Units that wait.
        running: Remaining seconds of each unit that holds a slot.
        slots: Number of slots of the pool, held ones included; without slots, nothing is exchanged.
        factor: As in `longest_first`.
    """
    order = longest_first(units, factor)
    if slots < 1 or len(order) > _FEW:
        return order
    known = calibration(units) if factor is None else factor
    seconds = {unit.name: expected_seconds(unit, known) for unit in units}

    def end(candidate: Sequence[Remaining]) -> float:
        return max(finish_times(running, [seconds[unit.name] for unit in candidate], slots), default=0.0)

    best = end(order)
    while True:
        # Of several pairs with the same gain, exchange the last one. So long units still start early, which helps when
        # lost work or bad estimates make them even longer.
        pairs = reversed(list(itertools.combinations(range(len(order)), 2)))
        candidate = min((_exchanged(order, i, j) for i, j in pairs), key=end, default=order)
        if end(candidate) >= best * (1 - _WORTH):
            return order
        order, best = candidate, end(candidate)


def _exchanged(order: Sequence[Remaining], i: int, j: int) -> list[Remaining]:
    changed = list(order)
    changed[i], changed[j] = order[j], order[i]
    return changed


def finish_times(running: Sequence[float], waiting: Sequence[float], slots: int) -> list[float]:
    """End times of all units if the waiting ones start in order, each on the first free slot.

    Args:
        running: Remaining seconds of each unit that holds a slot.
        waiting: Seconds that each waiting unit will take.
        slots: Number of slots of the pool, held ones included.

    Returns:
        End times in seconds from now, the running units first.

    Raises:
        ValueError: A unit waits and the pool has no slots.
    """
    if waiting and slots < 1:
        raise ValueError("a waiting unit needs at least one slot")
    # A pool that shrank may have fewer slots than running units; the slots beyond its new size are not reused.
    free = sorted([*running, *[0.0] * (slots - len(running))])[max(0, len(running) - slots) :]
    heapq.heapify(free)
    ends = list(running)
    for seconds in waiting:
        ends.append(heapq.heappop(free) + seconds)
        heapq.heappush(free, ends[-1])
    return ends
