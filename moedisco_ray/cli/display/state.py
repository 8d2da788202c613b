"""What the events so far add up to; knows nothing of terminals."""

from __future__ import annotations

import dataclasses
from typing import Literal

from moedisco_ray.cli.display.words import let_go
from moedisco_ray.core.events import Event


@dataclasses.dataclass
class StageState:
    """One line of the stage list."""

    status: Literal["waiting", "running", "done", "reused", "failed"] = "waiting"
    started: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass
class UnitState:
    """One progress bar."""

    stage: str | None
    steps: int = 0
    step: int = 0
    tokens: int = 0
    loss: float | None = None
    tokens_per_second: float = 0.0

    @property
    def done(self) -> float:
        """Share of the steps that are done."""
        return min(1.0, self.step / self.steps) if self.steps else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the current speed; None while there is none."""
        if not self.tokens_per_second or not self.step:
            return None
        return (self.steps - self.step) * (self.tokens / self.step) / self.tokens_per_second


@dataclasses.dataclass
class RunState:
    """Everything a view shows."""

    name: str = ""
    directory: str = ""
    stages: dict[str, StageState] = dataclasses.field(default_factory=dict)
    units: dict[str, UnitState] = dataclasses.field(default_factory=dict)
    cluster_tokens: list[int] = dataclasses.field(default_factory=list)
    cluster_documents: list[int] = dataclasses.field(default_factory=list)
    notices: list[str] = dataclasses.field(default_factory=list)
    current: str | None = None

    def update(self, event: Event) -> None:
        """Take one event in."""
        data = event.data
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
        elif event.type == "warning":
            self.notices.append(str(data.get("message", "")))

    def _stage_event(self, event: Event, stage: StageState) -> None:
        if event.type == "stage_started":
            stage.status, stage.started, self.current = "running", event.time, event.stage
        elif event.type == "stage_skipped":
            stage.status = "reused"
        else:
            stage.status, stage.seconds = "done", event.data.get("seconds", event.time - stage.started)

    def _unit_event(self, event: Event, unit: UnitState) -> None:
        data = event.data
        if event.type == "unit_let_go":
            self.notices.append(f"{event.unit}: {let_go(data)}")
            return
        unit.steps = data.get("steps", unit.steps)
        if data.get("step") is not None:    # of an attempt that ended before its first step none is known
            unit.step = data["step"]
        unit.loss = data.get("loss", unit.loss)
        unit.tokens_per_second = data.get("tokens_per_second", unit.tokens_per_second)
        if event.type in ("progress", "unit_finished"):
            unit.tokens = data.get("tokens", unit.tokens)
        if event.type == "worker_restarted":
            self.notices.append(f"{event.unit} restarted: {data.get('reason') or 'its worker died'}")
