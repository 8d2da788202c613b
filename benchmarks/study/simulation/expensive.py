"""The expensive nodes: when they are requested, wait and are released."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from benchmarks.study.simulation.setting import HOUR, Setting
from moedisco_ray.policies import arrival

Known = tuple[list[float], list[float], int, float]


class Gang:
    """The nodes of the fine-tune; they arrive one by one and wait for the last.

    Args:
        setting: Setting that determines when the nodes are requested.
        rng: Random generator for boot times.
    """

    def __init__(self, setting: Setting, rng: random.Random) -> None:
        self._setting = setting
        self._rng = rng
        self._arrivals: list[float] = []
        self._paid = 0.0

    def consider(self, now: float, boots: Sequence[float], known: Callable[[], Known]) -> float:
        """Request or release the nodes as the setting says; returns the most seconds until the next decision."""
        if self._setting.ask == "at_start" and not self._arrivals:
            self._ask(now)
        if self._setting.ask != "in_time":
            return math.inf
        left = arrival.ends_in(*known())
        boot = arrival.boot_seconds(boots, self._setting.gang)
        advice = arrival.advise(left, boot, asked=bool(self._arrivals))
        if advice == "ask":
            self._ask(now)
        elif advice == "release":
            self._pay(now)
            self._arrivals = []
        return left - boot

    def end(self, now: float) -> tuple[float, float]:
        """Dollars for waiting nodes, and seconds that the run waits for the last node."""
        if not self._arrivals:
            self._ask(now)
        ready = max(now, *self._arrivals)
        self._pay(ready)
        return self._paid, ready - now

    def _ask(self, now: float) -> None:
        self._arrivals = [
            now + self._setting.boot * self._rng.lognormvariate(0.0, 0.4) for _ in range(self._setting.gang)
        ]

    def _pay(self, until: float) -> None:
        waited = sum(max(0.0, until - arrived) for arrived in self._arrivals)
        self._paid += waited / HOUR * self._setting.gang_price
