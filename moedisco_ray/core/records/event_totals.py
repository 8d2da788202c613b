"""Gathers what a report needs of a run's events, one event at a time: a long run has a million events."""

from __future__ import annotations

import dataclasses
import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

from moedisco_ray.core.records.events import Event, EventType
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.records.run_record import Curve

T = TypeVar("T")

CURVE_POINTS = 400


class EventTotals:
    """What a report needs of a run's events.

    Args:
        events: Events of the run, in order.
        owned: Units whose events are measured.

    Attributes:
        meter: Usage of the run.
        losses: Training loss.
        held_out: Held-out loss during training.
        stalls: Seconds for which each stage's trainings stood still for checkpoints.
        sizes: Size of the events of each owned unit (bytes).
    """

    def __init__(self, events: Iterable[Event], owned: Collection[str] = ()) -> None:
        self.meter = Meter()
        self.losses, self.held_out = Losses("progress", "loss"), Losses("evaluation", "held_out_loss")
        self.stalls: defaultdict[str, float] = defaultdict(float)
        self.sizes: Counter[str] = Counter()
        self._mfu: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))
        for event in events:
            self._add(event, owned)

    @property
    def mfu(self) -> dict[str, float]:
        """Mean model FLOPs utilisation (MFU) of each stage, over the progress events of its trainings."""
        return {stage: statistics.fmean(each) for stage, each in self._mfu.items()}

    def _add(self, event: Event, owned: Collection[str]) -> None:
        self.meter.update(event)
        self.losses.add(event)
        self.held_out.add(event)
        if event.unit is not None and event.unit in owned:
            self.sizes[event.unit] += len(event.to_json())
        if event.stage is None:
            return
        if event.type == "checkpoint":
            self.stalls[event.stage] += event.data["stall"]
        elif event.type == "progress" and event.data.get("mfu") is not None:
            self._mfu[event.stage].append(event.data["mfu"])


class Losses:
    """Loss over tokens of every unit that reports it.

    If a unit goes back to an earlier step (resumed from a checkpoint, or begun again), its earlier reports from that
    step on are dropped: a curve holds each step once, as it was last trained.

    Args:
        kind: Type of the events with the loss.
        key: Key of the loss in the data of these events.
    """

    def __init__(self, kind: EventType, key: str) -> None:
        self._kind, self._key = kind, key
        self._units: defaultdict[str, _Points] = defaultdict(_Points)

    def add(self, event: Event) -> None:
        """Add the loss of the next event, if it reports one."""
        if event.type != self._kind or event.unit is None or event.data.get(self._key) is None:
            return
        points, step = self._units[event.unit], int(event.data["step"])
        while points.step and points.step[-1] >= step:
            for column in (points.step, points.tokens, points.loss):
                column.pop()
        points.stage = event.stage
        points.step.append(step)
        points.tokens.append(int(event.data["tokens"]))
        points.loss.append(float(event.data[self._key]))

    def curves(self) -> dict[str, Curve]:
        """A curve of at most `CURVE_POINTS` points for each unit."""
        curves = {}
        for unit, points in self._units.items():
            tokens, loss = thin(points.tokens, CURVE_POINTS), thin(points.loss, CURVE_POINTS)
            curves[unit] = Curve(stage=points.stage, tokens=[int(count) for count in tokens], loss=list(loss))
        return curves


@dataclasses.dataclass
class _Points:
    """Reports of one unit. Numbers of an array take 8 bytes each; as doubles, whole numbers have no largest one."""

    stage: str | None = None
    step: array[float] = dataclasses.field(default_factory=lambda: array("d"))
    tokens: array[float] = dataclasses.field(default_factory=lambda: array("d"))
    loss: array[float] = dataclasses.field(default_factory=lambda: array("d"))


def thin(values: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` of the values, evenly spaced, including the first and the last."""
    if len(values) <= most:
        return values
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]
