"""Estimate the time that queued trainings will take, from reported speeds, and choose the order in which they start."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.policies.checkpointing import HOUR, SaveCost, expected_stretch, interval
from moedisco_ray.policies.ordering import Remaining, calibration, expected_seconds, longest_first, soonest_done

RESTART_SECONDS = 30.0
"""Seconds from getting a slot to the next step that are assumed until a start has been measured."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Estimates for a queue of trainings.

    Attributes:
        running: Remaining work of each started training, which already holds or awaits a slot.
        waiting: Remaining work of each training that has not started.
        statuses: Last known status of each training, by name.
    """

    running: Sequence[Remaining]
    waiting: Sequence[Remaining]
    statuses: Mapping[str, UnitStatus]

    def order(self, room: int) -> list[str]:
        """Names of the waiting trainings, in the order in which to start them if `room` slots exist."""
        factor = calibration([*self.waiting, *self.running])
        running = [expected_seconds(unit, factor) for unit in self.running]
        return [unit.name for unit in soonest_done(self.waiting, running, room, factor)]

    def seconds_left(self) -> tuple[list[float], list[float]]:
        """Expected seconds left of each running and each waiting training, including start-up before the first step.

        All values are infinite until one of the trainings has reported its speed.
        """
        starts = [status.start_seconds for status in self.statuses.values() if status.start_seconds is not None]
        start = statistics.median(starts) if starts else RESTART_SECONDS
        timed = [
            Remaining(name, 1, 1.0, status.step_seconds)
            for name, status in self.statuses.items()
            if status.step_seconds
        ]
        factor = calibration(timed) if timed else math.inf
        return (
            [
                expected_seconds(unit, factor) + (0.0 if self.statuses[unit.name].step else start)
                for unit in self.running
            ],
            [expected_seconds(unit, factor) + start for unit in longest_first(self.waiting, factor)],
        )

    def stretch(self, losses_per_hour: float, boot_seconds: float) -> float:
        """Factor by which lost nodes and checkpoints are expected to lengthen the remaining time.

        Args:
            losses_per_hour: Lost workers per worker-hour.
            boot_seconds: Seconds until a new node replaces a lost one.
        """
        cost = SaveCost(max((status.stall for status in self.statuses.values()), default=0.0))
        restart = RESTART_SECONDS + boot_seconds
        return expected_stretch(interval(cost, losses_per_hour), cost.stall, HOUR / losses_per_hour, restart)
