"""State of machines and sub-models in the simulation, and its outcome."""

from __future__ import annotations

import dataclasses
import math

from benchmarks.study.simulation.attempt import Attempt
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


@dataclasses.dataclass(eq=False)
class Unit:
    """A sub-model and its present state."""

    work: Work
    history: retrying.History
    safe: float = 0.0
    measured: float | None = None
    state: quorum.State = "training"
    ended: float = 0.0
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
