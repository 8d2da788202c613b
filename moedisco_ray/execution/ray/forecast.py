"""How long a queue of trainings still takes, and in which order they start, from what the trainings have reported."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from moedisco_ray.execution.ray.event_mailbox import UnitStatus
from moedisco_ray.policies.checkpointing import HOUR, SaveCost, expected_stretch, interval
from moedisco_ray.policies.ordering import Remaining, calibration, expected_seconds, longest_first, soonest_done

RESTART_SECONDS = 30.0
"""Assumed time from getting a slot to the next step, until one was measured (s)."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The remaining work of a queue.

    Attributes:
        running: Remaining work of each training that holds or awaits a slot of its own.
        waiting: Remaining work of each training that waits.
        statuses: What each training has reported, by name.
    """

    running: Sequence[Remaining]
    waiting: Sequence[Remaining]
    statuses: Mapping[str, UnitStatus]

    def order(self, room: int) -> list[str]:
        """Names of the waiting trainings, in the order in which to start them on this number of slots."""
        factor = calibration([*self.waiting, *self.running])
        return [unit.name for unit in soonest_done(
            self.waiting, [expected_seconds(unit, factor) for unit in self.running], room, factor)]

    def seconds_left(self) -> tuple[list[float], list[float]]:
        """Expected seconds left of each running and each waiting training, with the starts of those that have not made a step.

        They are infinite until one of them has reported its speed.
        """
        starts = [status.start_seconds for status in self.statuses.values() if status.start_seconds is not None]
        start = statistics.median(starts) if starts else RESTART_SECONDS
        timed = [Remaining(name, 1, 1.0, status.step_seconds) for name, status in self.statuses.items() if status.step_seconds]
        factor = calibration(timed) if timed else math.inf
        return (
            [expected_seconds(unit, factor) + (0.0 if self.statuses[unit.name].step else start) for unit in self.running],
            [expected_seconds(unit, factor) + start for unit in longest_first(self.waiting, factor)])

    def stretch(self, losses_per_hour: float, boot_seconds: float) -> float:
        """Factor on the remaining seconds that accounts for lost nodes and checkpoints.

        Args:
            losses_per_hour: Lost workers per worker-hour.
            boot_seconds: Time until a node comes in place of a lost one (s).
        """
        cost = SaveCost(max((status.stall for status in self.statuses.values()), default=0.0))
        restart = RESTART_SECONDS + boot_seconds
        return expected_stretch(interval(cost, losses_per_hour), cost.stall, HOUR / losses_per_hour, restart)
