"""The state of a run, computed from its events, for any view."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from moedisco_ray.cli.display.formatting import let_go, stage_progress
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.bill import idle_in_words
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metered import metered_bill
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.plan import Plan


@dataclasses.dataclass
class StageState:
    """Status and progress of one stage."""

    status: Literal["waiting", "running", "done", "reused", "failed"] = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    activity: str = ""
    """Progress of the running stage in words, such as `1,200 of 5,000 documents`."""
    done: float | None = None
    """Share of the running stage's work that is done; None if the total is unknown."""


@dataclasses.dataclass
class UnitState:
    """Progress of one training unit."""

    stage: str | None
    steps: int = 0
    step: int = 0
    tokens: int = 0
    loss: float | None = None
    tokens_per_second: float = 0.0
    mfu: float | None = None

    @property
    def done(self) -> float:
        """Share of the unit's steps that are done."""
        return min(1.0, self.step / self.steps) if self.steps else 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds per step at the current speed; None before the first step."""
        if not self.tokens_per_second or not self.step:
            return None
        return self.tokens / self.step / self.tokens_per_second

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step at the current speed; None before the first step."""
        return None if self.seconds_per_step is None else (self.steps - self.step) * self.seconds_per_step


@dataclasses.dataclass
class RunState:
    """Everything that a view shows.

    Attributes:
        config: The run's configuration, which has the prices; None if the viewer does not know it.
        plan: The run's plan, from which the remaining time is estimated; None if the viewer does not know it.
    """

    config: RunConfig | None = None
    plan: Plan | None = None
    name: str = ""
    directory: str = ""
    stages: dict[str, StageState] = dataclasses.field(default_factory=dict)
    units: dict[str, UnitState] = dataclasses.field(default_factory=dict)
    cluster_tokens: list[int] = dataclasses.field(default_factory=list)
    cluster_documents: list[int] = dataclasses.field(default_factory=list)
    notices: list[str] = dataclasses.field(default_factory=list)
    current: str | None = None
    starting: bool = False
    meter: Meter = dataclasses.field(default_factory=Meter)

    def update(self, event: Event) -> None:
        data = event.data
        if self.config is not None:
            self.meter.update(event)
        self.starting = event.type == "ray_starting" or (self.starting and event.stage is None)
        if event.stage is not None and event.type.startswith("stage_"):
            self._stage_event(event, self.stages.setdefault(event.stage, StageState()))
        elif event.unit is not None:
            self._unit_event(event, self.units.setdefault(event.unit, UnitState(event.stage)))
        elif event.type == "run_started":
            self.name, self.directory = data.get("name", ""), data.get("directory", "")
            self.stages = {stage: StageState() for stage in data.get("stages", ())}
        elif event.type == "run_failed":
            for stage in self.stages.values():
                if stage.status == "running":
                    stage.status, stage.seconds = "failed", event.time - stage.started
        elif event.type == "clusters":
            self.cluster_tokens, self.cluster_documents = data.get("tokens", []), data.get("documents", [])
        elif event.type in ("warning", "run_finished"):
            self.notices += [str(data[key]) for key in ("message", "worse_than_start") if data.get(key)]

    def dollars(self) -> str | None:
        """The run's cost so far, in words; None where prices are unknown."""
        return None if self.config is None else idle_in_words(metered_bill(self.meter, self.config))

    def seconds_left(self, now: float) -> float | None:
        """Estimated seconds until the run ends; None after a failure, while Ray starts, or if a stage has no estimate.

        Args:
            now: Current time, in seconds since the epoch.
        """
        if self.plan is None or not self.stages or self.starting:
            return None
        planned = {stage.stage: stage.seconds for stage in self.plan.estimates}
        total = 0.0
        for name, stage in self.stages.items():
            left = planned.get(name) if stage.status == "waiting" else 0.0
            if stage.status == "running":
                left = self._running_left(name, planned.get(name), now - stage.started)
            if left is None or stage.status == "failed":
                return None
            total += left
        return total

    def _running_left(self, name: str, planned: float | None, elapsed: float) -> float | None:
        """Seconds left of a running stage, estimated from its trainers' speed, else its progress, else the plan."""
        units = [unit for unit in self.units.values() if unit.stage == name]
        training = [unit for unit in units if unit.done < 1 and unit.seconds_per_step is not None]
        if training:
            slowest = max(unit.seconds_left or 0.0 for unit in training)
            whole = max(unit.steps * (unit.seconds_per_step or 0.0) for unit in training)
            count = next((stage.units for stage in self.plan.stages if stage.stage == name), 0) if self.plan else 0
            return slowest + math.ceil(max(0, count - len(units)) / len(training)) * whole
        share = self.stages[name].done
        if share:
            return elapsed * (1 - share) / share
        return None if planned is None else max(0.0, planned - elapsed)

    def _stage_event(self, event: Event, stage: StageState) -> None:
        if event.type == "stage_started":
            stage.status, stage.started, self.current = "running", event.time, event.stage
        elif event.type == "stage_skipped":
            stage.status = "reused"
        elif event.type == "stage_progress":
            total = event.data.get("total")
            stage.activity, stage.done = (
                stage_progress(event.data),
                min(1.0, event.data.get("done", 0) / total) if total else None,
            )
        elif event.type == "stage_finished":
            stage.status, stage.seconds = "done", event.data.get("seconds", event.time - stage.started)

    def _unit_event(self, event: Event, unit: UnitState) -> None:
        data = event.data
        if event.type == "unit_let_go":
            self.notices.append(f"{event.unit}: {let_go(data)}")
            return
        unit.steps = data.get("steps", unit.steps)
        if data.get("step") is not None:  # None if an attempt ended before its first step
            unit.step = data["step"]
        unit.loss = data.get("loss", unit.loss)
        unit.tokens_per_second = data.get("tokens_per_second", unit.tokens_per_second)
        unit.mfu = data.get("mfu", unit.mfu)
        if event.type in ("progress", "unit_finished"):
            unit.tokens = data.get("tokens", unit.tokens)
        if event.type == "worker_restarted":
            self.notices.append(f"{event.unit} restarted: {data.get('reason') or 'its worker died'}")
