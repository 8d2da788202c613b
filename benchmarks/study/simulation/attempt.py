"""One stretch of training at one interval: after each a stall, and a while later the checkpoint is safe."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True, eq=False)
class Attempt:
    """Work is in seconds on a machine of speed 1, the rest in seconds of the clock.

    Attributes:
        node: The machine.
        begins: When the first step is made.
        start: Work that was done before.
        safe: Of it, what was safe; the rest is so when a checkpoint that was begun just before is.
        work: Work in all.
        speed: Of the machine.
        interval: Training between two checkpoints.
        stall: For which training stands still.
        latency: From a checkpoint's beginning until it is safe.
    """

    node: Any
    begins: float
    start: float
    safe: float
    work: float
    speed: float
    interval: float
    stall: float
    latency: float

    @property
    def ends(self) -> float:
        """When all is done and the result is safe."""
        return self.begins + self._clock(self.work - self.start) + self.latency

    @property
    def review(self) -> float:
        """When its interval is worked out anew: after the first checkpoint that is begun an hour later."""
        return self.begins + math.ceil(3600 / (self.interval + self.stall)) * (self.interval + self.stall)

    def left(self, now: float) -> float:
        """Seconds until then, checkpoints included."""
        return max(0.0, self.ends - now)

    def done(self, now: float) -> float:
        """Work that is done, safe or not."""
        elapsed = max(0.0, now - self.begins)
        whole, part = divmod(elapsed, self.interval + self.stall)
        return min(self.work, self.start + self.speed * (whole * self.interval + min(part, self.interval)))

    def saved(self, now: float) -> float:
        """Work that the newest safe checkpoint holds."""
        elapsed = now - self.begins + self.stall - self.latency
        if elapsed < 0:
            return self.safe
        whole = math.floor(elapsed / (self.interval + self.stall))
        return min(self.done(now), self.start + self.speed * whole * self.interval)

    def _clock(self, work: float) -> float:
        seconds = work / self.speed
        saves = max(0, math.ceil(seconds / self.interval) - 1)
        return seconds + saves * self.stall
