"""Twenty moments at which something is killed: drawn from a seed, and such that the run may survive them."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal

from service.domain.outcome import FUTILE_LIMIT

Target = Literal["service", "driver"]
Moment = Literal["events", "steps", "service start", "driver start"]
"""Unit of a moment. `events`: further events of the stream. `steps`: steps of the present driver beyond any earlier
one. `service start`, `driver start`: seconds after the process that was killed last started again."""

_SERVICE_SHARE = 0.6
"""Of the kills; that of a driver costs the most time."""
_MOST: dict[Moment, float] = {"events": 15, "steps": 12, "service start": 4.0, "driver start": 12.0}


@dataclasses.dataclass(frozen=True)
class Kill:
    """What is killed, and when: `amount` is of events, steps or seconds."""

    target: Target
    moment: Moment
    amount: float

    def __str__(self) -> str:
        return f"kill -9 of the {self.target} at {self.moment} + {self.amount:.3g}"


def draw(seed: int, count: int) -> list[Kill]:
    """A plan.

    The service gives a run up after `FUTILE_LIMIT` drivers in a row that got no further, so that before one more is
    killed a driver is waited for that does.
    """
    generator = random.Random(seed)
    kills: list[Kill] = []
    futile, starting = 0, {"service": False, "driver": False}
    for _ in range(count):
        target: Target = "service" if generator.random() < _SERVICE_SHARE else "driver"
        moment = generator.choice(_possible(target, futile, starting))
        most = _MOST[moment]
        amount = generator.uniform(0, most) if moment.endswith("start") else float(generator.randint(1, int(most)))
        kills.append(Kill(target, moment, amount))
        still_starting = starting["driver"] and moment.endswith("start")
        starting = {"service": target == "service", "driver": target == "driver" or still_starting}
        if moment == "steps":
            futile = 0
        if target == "driver":
            futile += moment != "steps"
    return kills


def _possible(target: Target, futile: int, starting: dict[str, bool]) -> list[Moment]:
    moments: list[Moment] = ["steps"]
    if target == "service":
        moments.append("events")
        if starting["service"]:
            moments.append("service start")
    if starting["driver"] and (target == "service" or futile < FUTILE_LIMIT - 1):
        moments.append("driver start")
    return moments
