"""Which sub-model starts next, and how long a queue of them takes.

Longest expected remaining time first, so that the last one does not run alone. On m equal slots such a list is never
worse than 4/3 - 1/(3m) times the best order there is (Graham, "Bounds on multiprocessing timing anomalies", SIAM Journal
on Applied Mathematics 17, 1969, theorem 2). Of few units it can be some per cent worse; there, exchanging two at a time as
long as that ends the last one earlier makes up for most of it.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import statistics
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Remaining:
    """What a unit still has to do.

    Attributes:
        name: The unit.
        steps: Optimizer steps that are left.
        planned: Seconds per step before anything is measured; a figure that is right up to one factor is good enough.
        measured: Seconds per step as the unit was last seen to run; None: it never ran.
    """

    name: str
    steps: int
    planned: float
    measured: float | None = None


def calibration(units: Iterable[Remaining]) -> float:
    """How much slower than planned those that ran turned out to be: the median ratio, 1 of none.

    Without it, a unit that ran would seem longer than one that waits wherever the plan is too rosy for both.
    """
    ratios = [unit.measured / unit.planned for unit in units if unit.measured is not None]
    return statistics.median(ratios) if ratios else 1.0


def expected_seconds(unit: Remaining, factor: float = 1.0) -> float:
    """Seconds that a unit still takes on one slot.

    Args:
        unit: What is left of it.
        factor: Corrects the planned speed where none is measured; see `calibration`.
    """
    return unit.steps * (unit.planned * factor if unit.measured is None else unit.measured)


def longest_first(units: Sequence[Remaining], factor: float | None = None) -> list[Remaining]:
    """The order in which they should start; equals keep theirs.

    Args:
        units: What waits.
        factor: Corrects the planned speed where none is measured; None: `calibration` of these units.
    """
    known = calibration(units) if factor is None else factor
    return sorted(units, key=lambda unit: -expected_seconds(unit, known))


_FEW = 24
"""Units of which pairs are exchanged; of more, one among many matters little, and looking at all pairs takes long."""
_WORTH = 0.005
"""The share by which an exchange must end the last one earlier: estimates are not as good as that."""


def soonest_done(units: Sequence[Remaining], running: Sequence[float], slots: int, factor: float | None = None) -> list[Remaining]:
    """The order in which they should start, so that the last one ends early: `longest_first`, with pairs exchanged.

    Args:
        units: What waits.
        running: Seconds left of those that hold a slot.
        slots: Slots of the pool, those that are held included; of none, nothing is exchanged.
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
        # Of equals the last pair: a long one that starts late is what losses and wrong estimates make longer still.
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
    """When each unit ends, if the waiting ones start in their order on the first slot that is free.

    Args:
        running: Seconds left of those that hold a slot.
        waiting: Seconds of those that hold none.
        slots: Slots of the pool, those that are held included.

    Returns:
        Seconds from now, the running ones first.

    Raises:
        ValueError: Something waits and there is no slot.
    """
    if waiting and slots < 1:
        raise ValueError("nothing that waits can ever start without a slot")
    # A pool that shrank may have fewer slots than runs: those end, and as many slots are not taken again.
    free = sorted([*running, *[0.0] * (slots - len(running))])[max(0, len(running) - slots):]
    heapq.heapify(free)
    ends = list(running)
    for seconds in waiting:
        ends.append(heapq.heappop(free) + seconds)
        heapq.heappush(free, ends[-1])
    return ends


def makespan_bound(seconds: Sequence[float], slots: int) -> float:
    """No schedule ends earlier: the longest unit, or all of them divided evenly."""
    return max(max(seconds, default=0.0), sum(seconds) / slots)
