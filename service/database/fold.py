"""Computes the state of stages, units and curves, and the furthest progress of a run, from its driver's events.

Events are not trusted: an event with invalid data stays in the stream but changes no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from moedisco_ray.core.records.events import Event
from service.database import values
from service.database.tables import UnitRow

_FINAL_EVENTS = ("run_finished", "run_failed", "run_stopped")
_STAGE_EVENTS = ("stage_started", "stage_skipped", "stage_finished")
_STAGE_WEIGHT = 10**12
"""Amount that each finished stage adds to `Fold.mark`. It exceeds any number of steps, because each step adds 1."""


class Fold:
    """Updates a run's progress, units and curves with one event after the other.

    Attributes:
        units: Rows by the name of the unit, including new rows; they are changed in place.
        made: New units.
        points: New points by the name of the unit, in ascending order of their steps.
        rewound: Lowest step among the new points of each unit; stored points from that step on are replaced.
        held_out: New measurements of the held-out loss by the name of the unit, in ascending order of their steps.
        taken: Number of the offered run that has given a stage, by stage.
        results: Columns of the run with the figures of its model, as far as new events change them.
        decisive: Whether an event says that a driver began or ended, so that the run's state may have to change.
    """

    def __init__(self, run_id: str, progress: Mapping[str, Any], units: Mapping[str, UnitRow]) -> None:
        self._run_id = run_id
        self._stages: dict[str, dict[str, Any]] = {
            name: dict(stage) for name, stage in progress.get("stages", {}).items()
        }
        self._current: str | None = progress.get("current")
        self._ended: dict[str, Any] | None = progress.get("ended")
        reached = progress.get("reached", {})
        self._finished: list[str] = list(reached.get("stages", ()))
        self._furthest: dict[str, int] = dict(reached.get("steps", {}))
        self.units = dict(units)
        self.made: list[UnitRow] = []
        self.points: dict[str, list[dict[str, Any]]] = {}
        self.rewound: dict[str, int] = {}
        self.held_out: dict[str, list[dict[str, Any]]] = {}
        self.taken: dict[str, int] = {}
        self.results: dict[str, float | int | None] = {}
        self.decisive = False

    @property
    def progress(self) -> dict[str, Any]:
        """Value of the run's `progress` column: {stages, current, reached}, and `ended` once the driver has ended."""
        reached = {"stages": self._finished, "steps": self._furthest}
        ended = {} if self._ended is None else {"ended": self._ended}
        return {"stages": self._stages, "current": self._current, "reached": reached, **ended}

    @property
    def mark(self) -> int:
        """Furthest progress in stages and steps, as one number that never falls."""
        return len(self._finished) * _STAGE_WEIGHT + sum(self._furthest.values())

    def update(self, event: Event) -> None:
        if event.unit is not None and event.stage is not None:
            self._unit_event(event, values.text(event.stage, 32), values.text(event.unit, 64))
        elif event.stage is not None and event.type in _STAGE_EVENTS:
            self._stage_event(event, values.text(event.stage, 32))
        elif event.type == "run_started":
            self._begin(event)
        elif event.type in _FINAL_EVENTS:
            self._end(event)

    def _begin(self, event: Event) -> None:
        self.decisive, self._ended, self._current = True, None, None
        names = event.data.get("stages")
        if not isinstance(names, list):
            names = list(self._stages)
        self._stages = {values.text(name, 32): _stage("waiting") for name in names if isinstance(name, str)}
        for unit in self.units.values():
            if unit.status == "running":
                unit.status = "restarting"

    def _end(self, event: Event) -> None:
        self.decisive, self._ended = True, {**values.named_document(event.data), "type": event.type, "time": event.time}
        status = {"run_failed": "failed", "run_stopped": "waiting"}.get(event.type, "done")
        for stage in self._stages.values():
            if stage["status"] == "running":
                stage["status"] = status
                stage["seconds"] = max(0.0, event.time - stage["started"])

    def _stage_event(self, event: Event, name: str) -> None:
        if event.type == "stage_started":
            self._stages[name], self._current = _stage("running", event.time), name
            self.results |= figures_of(name, {})
            return
        before = self._stages.get(name) or _stage("waiting")
        if event.type == "stage_skipped":
            self._stages[name] = before | {"status": "reused"}
            offer = values.whole(event.data.get("offer"))
            if offer is not None:
                self.taken[name] = offer
        else:
            seconds = values.number(event.data.get("seconds"))
            self._stages[name] = before | {"status": "done", "seconds": seconds}
            self.results |= figures_of(name, event.data.get("summary"))
        if name not in self._finished:
            self._finished.append(name)

    def _unit_event(self, event: Event, stage: str, name: str) -> None:
        unit = self.units.get(name)
        if unit is None:
            unit = self.units[name] = _new_unit(self._run_id, stage, name, event.time)
            self.made.append(unit)
        if event.type == "progress":
            self._progress(event, unit)
        elif event.type == "evaluation":
            self._evaluation(event, unit)
        elif event.type == "unit_started":
            unit.stage, unit.status, unit.ended = stage, "running", None
            unit.steps = _known(event.data, "steps", unit.steps)
            unit.workers = _known(event.data, "workers", unit.workers)
            node = event.data.get("node")
            unit.node = values.text(node, 256) if isinstance(node, str) else unit.node
        elif event.type == "worker_restarted":
            unit.status, unit.restarts = "restarting", unit.restarts + 1
        elif event.type == "unit_let_go":
            unit.status, unit.ended = "done", event.time
        elif event.type == "unit_finished":
            unit.status, unit.ended = "done", event.time
            unit.steps = _known(event.data, "steps", unit.steps)
            unit.tokens = _known(event.data, "tokens", unit.tokens)
            unit.step = unit.steps
            unit.loss = values.number(event.data.get("loss", unit.loss))
            self._reach(name, unit.step)

    def _progress(self, event: Event, unit: UnitRow) -> None:
        data = event.data
        step = values.whole(data.get("step"))
        if step is None:
            return
        loss, speed = values.number(data.get("loss")), values.number(data.get("tokens_per_second"))
        tokens = _known(data, "tokens", unit.tokens)
        unit.status, unit.step, unit.tokens, unit.loss, unit.tokens_per_second = "running", step, tokens, loss, speed
        unit.mfu = values.number(data.get("mfu"))
        unit.steps = _known(data, "steps", unit.steps)
        self._reach(unit.unit, step)
        points = self.points.setdefault(unit.unit, [])
        while points and points[-1]["step"] >= step:
            points.pop()
        self.rewound[unit.unit] = min(step, self.rewound.get(unit.unit, step))
        points.append(
            {
                "run_id": self._run_id,
                "unit": unit.unit,
                "step": step,
                "tokens": tokens,
                "time": event.time,
                "loss": loss,
                "lr": values.number(data.get("lr")),
                "grad_norm": values.number(data.get("grad_norm")),
                "tokens_per_second": speed,
                "mfu": unit.mfu,
                "largest_load": values.number(data.get("largest_load")),
                "dead_experts": values.whole(data.get("dead_experts")),
            }
        )

    def _evaluation(self, event: Event, unit: UnitRow) -> None:
        data = event.data
        step, loss = values.whole(data.get("step")), values.number(data.get("held_out_loss"))
        if step is None or loss is None:
            return
        measured = [each for each in self.held_out.get(unit.unit, ()) if each["step"] < step]
        tokens = _known(data, "tokens", unit.tokens)
        made = {"run_id": self._run_id, "unit": unit.unit, "step": step, "tokens": tokens, "time": event.time}
        self.held_out[unit.unit] = [*measured, {**made, "held_out_loss": loss}]

    def _reach(self, unit: str, step: int) -> None:
        # An invalid, huge step must not overflow the column.
        self._furthest[unit] = max(self._furthest.get(unit, 0), min(step, _STAGE_WEIGHT // 1000))


def figures_of(stage: str, summary: object) -> dict[str, float | int | None]:
    """Columns of a run that the summary of a finished stage sets; null where it lacks a figure."""
    found = summary if isinstance(summary, dict) else {}
    return _FIGURES[stage](found) if stage in _FIGURES else {}


def _of_evaluation(summary: Mapping[str, Any]) -> dict[str, float | int | None]:
    perplexity = values.number(summary.get("perplexity"))
    return {
        "perplexity": perplexity,
        "bits_per_byte": values.number(summary.get("bits_per_byte")),
        "held_out_loss": math.log(perplexity) if perplexity is not None and perplexity > 0 else None,
    }


def _of_export(summary: Mapping[str, Any]) -> dict[str, float | int | None]:
    return {"active_parameters": values.whole(summary.get("active_parameters"))}


_FIGURES: Mapping[str, Callable[[Mapping[str, Any]], dict[str, float | int | None]]] = {
    "evaluate": _of_evaluation,
    "export": _of_export,
}
"""Readers of the summaries that hold figures of the finished model, by stage."""


def meterable(event: Event, pools: Collection[str]) -> bool:
    """Whether the cost meter can process an event's data; `pools` are the names of the run's pools and node types."""
    data = event.data
    if event.type == "workers_held":
        named = isinstance(data.get("hold"), str) and isinstance(data.get("pool"), str)
        return named and data["pool"] in pools and values.whole(data.get("workers")) is not None
    if event.type == "slots_free":
        return (
            isinstance(data.get("pool"), str) and data["pool"] in pools and values.whole(data.get("slots")) is not None
        )
    return event.type != "workers_released" or isinstance(data.get("hold"), str)


def _stage(status: str, started: float | None = None) -> dict[str, Any]:
    return {"status": status, "started": started, "seconds": None}


def _known(data: Mapping[str, Any], key: str, otherwise: int) -> int:
    value = values.whole(data.get(key))
    return otherwise if value is None else value


def _new_unit(run_id: str, stage: str, name: str, started: float) -> UnitRow:
    return UnitRow(
        run_id=run_id,
        unit=name,
        stage=stage,
        status="running",
        step=0,
        steps=0,
        tokens=0,
        loss=None,
        tokens_per_second=None,
        mfu=None,
        restarts=0,
        workers=1,
        node=None,
        started=started,
        ended=None,
    )
