"""State of machines, attempts and sub-models in the simulation, and its outcome."""

from __future__ import annotations

import dataclasses
import math

from benchmarks.study.simulation.setting import Kind, Work
from moedisco_ray.policies import ordering, quorum, retrying


@dataclasses.dataclass(eq=False)
class Node:
    """A machine; it is paid for from its request on."""

    kind: Kind
    zone: int
    since: float
    up: bool = False
    leaving: bool = False
    gone: bool = False
    unit: Unit | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Attempt:
    """One attempt on one machine. Work is in seconds on a machine of speed 1, all other times in wall-clock seconds.

    Attributes:
        node: Machine of the attempt.
        begins: Time of the first step.
        start: Work done before the attempt.
        safe: Part of `start` that was already safe; the rest becomes safe with a checkpoint begun just before the
            attempt.
        work: Total work.
        speed: Speed of the machine.
        interval: Training time between two checkpoints.
        stall: Time for which a checkpoint stops training.
        latency: Time from the beginning of a checkpoint until it is safe.
    """

    node: Node
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
        """Time at which all work is done and the result is safe."""
        return self.begins + self._clock(self.work - self.start) + self.latency

    @property
    def review(self) -> float:
        """Time to recompute the interval: after the first checkpoint that begins an hour or more after the start."""
        return self.begins + math.ceil(3600 / (self.interval + self.stall)) * (self.interval + self.stall)

    def left(self, now: float) -> float:
        """Seconds until the attempt ends, including checkpoints."""
        return max(0.0, self.ends - now)

    def done(self, now: float) -> float:
        """Work done so far, safe or not."""
        elapsed = max(0.0, now - self.begins)
        whole, part = divmod(elapsed, self.interval + self.stall)
        return min(self.work, self.start + self.speed * (whole * self.interval + min(part, self.interval)))

    def saved(self, now: float) -> float:
        """Work in the newest safe checkpoint."""
        elapsed = now - self.begins + self.stall - self.latency
        if elapsed < 0:
            return self.safe
        whole = math.floor(elapsed / (self.interval + self.stall))
        return min(self.done(now), self.start + self.speed * whole * self.interval)

    def _clock(self, work: float) -> float:
        seconds = work / self.speed
        saves = max(0, math.ceil(seconds / self.interval) - 1)
        return seconds + saves * self.stall


@dataclasses.dataclass(eq=False)
class Unit:
    """A sub-model and its present state."""

    work: Work
    history: retrying.History
    safe: float = 0.0
    measured: float | None = None
    state: quorum.State = "training"
    attempt: Attempt | None = None

    @property
    def left(self) -> float:
        """Work that no checkpoint contains yet (s on a machine of speed 1)."""
        return self.work.seconds - self.safe

    @property
    def remaining(self) -> ordering.Remaining:
        steps = max(0, math.ceil(self.left / self.work.step_seconds))
        return ordering.Remaining(self.work.name, steps, self.work.planned_step_seconds, self.measured)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of a simulation.

    Attributes:
        makespan: Seconds until the merge could start.
        dollars: Cost of the cheap pool.
        bound: Lower bound on the makespan of any schedule (s).
        bound_dollars: Lower bound on the cost of any schedule.
        losses: Machines lost while they trained.
        lost_hours: Work that was repeated (h).
        finished: Number of finished sub-models.
        idle_dollars: Cost of expensive nodes while they waited.
        late: Seconds from the end of the phase until all expensive nodes were ready.
    """

    makespan: float
    dollars: float
    bound: float
    bound_dollars: float
    losses: int
    lost_hours: float
    finished: int
    idle_dollars: float
    late: float
