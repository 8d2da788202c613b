"""What an arm's training has cost at each look at its held-out loss, and what a loss costs.

Two accounts are kept of every run. The planned one multiplies the tokens trained so far by the plan's dollars and hours per
token of their phase: arithmetic on operations, prices and the pools' speeds, the same on every machine. The metered one is the fold
that bills runs (`metering`): every second for which a worker was held, merging, evaluation and looks at the loss included.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from moedisco_ray.events import Event
from moedisco_ray.metering import Meter
from moedisco_ray.plan import Plan, StagePlan

Axis = Literal["tokens", "dollars", "hours", "metered_dollars", "metered_hours"]
_ATTEMPT_ENDS = ("run_finished", "run_failed", "run_stopped")


@dataclasses.dataclass(frozen=True)
class Point:
    """One look at the held-out loss.

    Attributes:
        stage: Which model was looked at: `seed` or `finetune`.
        tokens: Trained on so far, by all models of the run.
        dollars: Planned, of those tokens.
        hours: Planned, wall-clock.
        metered_dollars: What the workers held so far cost.
        metered_hours: Wall-clock, without the time between an attempt's end and the next one's start.
        loss: Nats per token.
    """

    stage: str
    tokens: int
    dollars: float
    hours: float
    metered_dollars: float
    metered_hours: float
    loss: float


def curve(events: Iterable[Event], plan: Plan, prices: Mapping[str, float]) -> list[Point]:
    """The run's looks at its held-out loss, in order.

    Of steps that were made twice, because a training went back to a checkpoint, the last look counts.

    Args:
        events: The run's, oldest first.
        plan: The run's.
        prices: Dollars per worker-hour of each pool.
    """
    meter, clock = Meter(), _Clock()
    points: list[Point] = []
    for event in events:
        meter.update(event)
        clock.update(event)
        if event.type != "evaluation" or event.stage is None:
            continue
        before = _phases_before(plan, event.stage)
        phase = next(stage for stage in plan.stages if stage.stage == event.stage)
        part = event.data["tokens"] / phase.cost.tokens
        tokens = sum(stage.cost.tokens for stage in before) + event.data["tokens"]
        while points and points[-1].tokens >= tokens:
            points.pop()
        points.append(Point(
            event.stage, tokens,
            dollars=sum(stage.cost.dollars for stage in before) + part * phase.cost.dollars,
            hours=sum(stage.cost.hours for stage in before) + part * phase.cost.hours,
            metered_dollars=metered_dollars(meter, prices), metered_hours=clock.seconds / 3600,
            loss=float(event.data["held_out_loss"])))
    return points


def wall_hours(events: Iterable[Event]) -> float:
    """Wall-clock time of a run's attempts together."""
    clock = _Clock()
    for event in events:
        clock.update(event)
    return clock.seconds / 3600


def metered_dollars(meter: Meter, prices: Mapping[str, float]) -> float:
    """Worker-seconds at their pool's price."""
    return sum(seconds / 3600 * prices[pool] for pool, seconds in meter.worker_seconds.items())


def first_reach(points: Sequence[Point], loss: float, axis: Axis) -> float | None:
    """Where the curve of the whole model first comes down to a loss, between two looks by linear interpolation.

    Args:
        points: In order; the seed's are passed over, for it is another model.
        loss: To reach.
        axis: What is asked for.

    Returns:
        None where the loss is never reached.
    """
    own = [point for point in points if point.stage == "finetune"]
    if own and own[0].loss <= loss:
        return float(getattr(own[0], axis))
    for left, right in itertools.pairwise(own):
        if right.loss <= loss:
            at = (left.loss - loss) / (left.loss - right.loss)
            start, end = getattr(left, axis), getattr(right, axis)
            return float(start + at * (end - start))
    return None


def loss_at(points: Sequence[Point], value: float, axis: Axis) -> float | None:
    """The whole model's loss where so much was spent, between two looks by linear interpolation; None outside of the curve."""
    own = [point for point in points if point.stage == "finetune"]
    for left, right in itertools.pairwise(own):
        start, end = getattr(left, axis), getattr(right, axis)
        if start <= value <= end:
            return left.loss + (value - start) / (end - start) * (right.loss - left.loss)
    return None


def phases(plan: Plan) -> list[dict[str, Any]]:
    """Per training phase: `stage`, `pool`, `steps` of one model, `tokens`, `flops`, `hours`, `dollars`, as planned."""
    return [
        {
            "stage": stage.stage, "pool": stage.pool, "steps": stage.steps, "tokens": stage.cost.tokens,
            "flops": stage.cost.flops, "hours": stage.cost.hours, "dollars": stage.cost.dollars,
        }
        for stage in plan.stages]


def _phases_before(plan: Plan, stage: str) -> list[StagePlan]:
    return list(itertools.takewhile(lambda phase: phase.stage != stage, plan.stages))


class _Clock:
    """Wall-clock time of a run's attempts, one after the other."""

    def __init__(self) -> None:
        self._closed = 0.0
        self._started: float | None = None
        self._newest = 0.0

    def update(self, event: Event) -> None:
        """Take the next event in."""
        if event.type == "run_started":
            self._close()
            self._started = event.time
        self._newest = event.time
        if event.type in _ATTEMPT_ENDS:
            self._close()

    @property
    def seconds(self) -> float:
        """Up to the newest event."""
        return self._closed + (0.0 if self._started is None else self._newest - self._started)

    def _close(self) -> None:
        self._closed = self.seconds
        self._started = None
