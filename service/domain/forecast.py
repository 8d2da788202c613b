"""When an active run will end and what it will have cost, from its plan and its progress so far.

A training stage takes as long as its trainings at their own pace. Where few steps are made, the plan's time counts too,
times what the stages of this kind have taken against their plan. Stages to come take the plan's time times that ratio.
Short stages that train nothing say little of others: their ratio is that of their time with 5 % of the plan's added
on both sides.

Let T be the expected seconds of a training, e its seconds so far, f the share of its steps that are made, and P what is
expected without them. Then T = (e + k P) / (f + k) with k = 0.05, and (1 - f) T seconds are left. With n trainings at a
time, a stage takes the longest time left of a training, or the sum of the times left divided by n, whichever is more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ValidationError

from moedisco_ray.core.stages import TRAINING

_WEIGHT_OF_PLAN = 0.05
_WEIGHT_OF_SHORT = 0.05
_LEAST_SHARE = 0.1
"""Time left of a stage without steps that takes longer than expected, relative to its time so far."""
_TRAINING = frozenset(stage.name for stage in TRAINING)
_RATIOS = (0.02, 50.0)
"""Range of the time that stages take against their plan; what is outside of it says nothing of later stages."""


class PlannedTime(BaseModel, frozen=True):
    """Planned time and cost of one stage; null if unknown."""

    stage: str
    seconds: float | None = None
    dollars: float | None = None


class PlannedTraining(BaseModel, frozen=True):
    """Planned trainings of one stage."""

    stage: str
    units: int = 1
    workers: int = 1


class PlannedRun(BaseModel, frozen=True):
    """What a forecast needs of a stored plan."""

    estimates: tuple[PlannedTime, ...] = ()
    stages: tuple[PlannedTraining, ...] = ()


@dataclasses.dataclass(frozen=True)
class StageState:
    """Progress of one stage: its status, its start (seconds since the epoch), and its seconds once it has ended."""

    name: str
    status: Literal["waiting", "running", "done", "reused", "failed"]
    started: float | None
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class UnitState:
    """Progress of one training; `started` and `ended` are seconds since the epoch."""

    stage: str
    done: bool
    step: int
    steps: int
    started: float | None
    ended: float | None


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The expected end of a run.

    Attributes:
        ends: Time of the end, in seconds since the epoch.
        dollars: Cost of the whole run; None if the plan knows no prices.
    """

    ends: float
    dollars: float | None


def planned_run(document: Mapping[str, object]) -> PlannedRun | None:
    """What a forecast needs of a stored plan; None if another version stored it in another form."""
    try:
        return PlannedRun.model_validate(document)
    except ValidationError:
        return None


def forecast(
    plan: PlannedRun, stages: Sequence[StageState], units: Sequence[UnitState], *, now: float, spent: float
) -> Forecast | None:
    """The expected end and cost of a run; None if the plan does not know the time of a stage that is not done.

    Args:
        plan: The run's plan.
        stages: All stages of the run, in the order of the pipeline.
        units: All trainings that have started.
        now: Seconds since the epoch.
        spent: Dollars so far.
    """
    times = {each.stage: each for each in plan.estimates}
    trainings = {each.stage: each for each in plan.stages}
    past = _Past(_WEIGHT_OF_SHORT * sum(each.seconds or 0.0 for each in plan.estimates))
    left, dollars = 0.0, 0.0
    priced = True
    for stage in stages:
        planned = times.get(stage.name, PlannedTime(stage=stage.name))
        if stage.status in ("done", "reused"):
            past.add(stage.name, stage.seconds if stage.status == "done" else None, planned.seconds)
            continue
        if planned.seconds is None:
            return None
        seconds = past.ratio(stage.name) * planned.seconds
        if stage.status == "running" and stage.started is not None:
            so_far = max(0.0, now - stage.started)
            training = trainings.get(stage.name, PlannedTraining(stage=stage.name))
            own = [unit for unit in units if unit.stage == stage.name]
            seconds = _left(own, training, seconds, now) if own else max(seconds - so_far, _LEAST_SHARE * so_far)
            past.add(stage.name, so_far + seconds if own else None, planned.seconds)
        left += seconds
        priced = priced and planned.dollars is not None
        if planned.seconds:
            dollars += (planned.dollars or 0.0) * seconds / planned.seconds
    return Forecast(now + left, spent + dollars if priced else None)


class _Past:
    """What stages took against their plan, apart for stages that train and for others.

    Args:
        as_planned: Time for which others are taken to have run as planned, before any has (s).
    """

    def __init__(self, as_planned: float) -> None:
        self._taken: dict[bool, float] = {False: as_planned}
        self._planned: dict[bool, float] = {False: as_planned}

    def add(self, stage: str, taken: float | None, planned: float | None) -> None:
        if taken is not None and planned is not None:
            kind = stage in _TRAINING
            self._taken[kind] = self._taken.get(kind, 0.0) + taken
            self._planned[kind] = self._planned.get(kind, 0.0) + planned

    def ratio(self, stage: str) -> float:
        kind = stage in _TRAINING
        planned = self._planned.get(kind, 0.0)
        low, high = _RATIOS
        return min(high, max(low, self._taken[kind] / planned)) if planned > 0 else 1.0


def _left(units: Sequence[UnitState], training: PlannedTraining, seconds: float, now: float) -> float:
    """Seconds left of a running stage that takes `seconds` in all by the plan, corrected by earlier stages."""
    count = max(training.units, len(units))
    at_once = max(1, min(count, training.workers))
    expected = seconds * at_once / count
    begun = [_unit_left(unit, expected, now) for unit in units]
    mean = _mean(whole for _, whole in begun) if begun else expected
    lefts = [left for left, _ in begun] + [mean] * (count - len(units))
    return max(*lefts, sum(lefts) / at_once)


def _unit_left(unit: UnitState, expected: float, now: float) -> tuple[float, float]:
    """Seconds left of a training, and its expected seconds in all."""
    started = now if unit.started is None else unit.started
    if unit.done:
        taken = max(0.0, (now if unit.ended is None else unit.ended) - started)
        return 0.0, taken
    share = min(1.0, unit.step / unit.steps) if unit.steps > 0 else 0.0
    whole = (max(0.0, now - started) + _WEIGHT_OF_PLAN * expected) / (share + _WEIGHT_OF_PLAN)
    return (1 - share) * whole, whole


def _mean(numbers: Iterable[float]) -> float:
    found = list(numbers)
    return sum(found) / len(found)
