"""What the simulation keeps of machines and sub-models, and what it gives back."""

from __future__ import annotations

import dataclasses
import math

from benchmarks.study.simulation.attempt import Attempt
from benchmarks.study.simulation.setting import Kind, Work
from moedisco_ray.policies import ordering, quorum, retrying


@dataclasses.dataclass(eq=False)
class Node:
    """A machine. It is paid for from when it is asked for."""

    kind: Kind
    zone: int
    since: float
    up: bool = False
    leaving: bool = False
    gone: bool = False
    unit: Unit | None = None


@dataclasses.dataclass(eq=False)
class Unit:
    """A sub-model as it stands."""

    work: Work
    history: retrying.History
    safe: float = 0.0
    measured: float | None = None
    state: quorum.State = "training"
    ended: float = 0.0
    attempt: Attempt | None = None

    @property
    def left(self) -> float:
        """Seconds of work on a machine of speed 1 that no checkpoint holds yet."""
        return self.work.seconds - self.safe

    @property
    def remaining(self) -> ordering.Remaining:
        steps = max(0, math.ceil(self.left / self.work.step_seconds))
        return ordering.Remaining(self.work.name, steps, self.work.planned_step_seconds, self.measured)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        makespan: Seconds until the merge could start.
        dollars: Of the cheap pool.
        bound: No schedule ends earlier, in seconds.
        bound_dollars: No schedule costs less.
        losses: Machines lost while they trained.
        lost_hours: Work that was done again.
        finished: Sub-models that ended.
        idle_dollars: Paid for expensive nodes that waited.
        late: Seconds from the merge's moment until the expensive nodes were there.
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
