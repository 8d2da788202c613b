"""Forecasts of runs that were recorded: what the service knew at every moment, on 2 cores, from `make demo`'s service.

The plans are those of the commit that added the recordings. `demo` is the preset; `longer` has 4 million tokens and
another seed; `own-text` reads docs/*.md as a data set; `joint` is that with recipe: joint; `finetune-again` is a retry
that took all stages but the last three. Each recording has the run's plan, the span of its stages, and the steps of its
trainings, in seconds since its start.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from service.domain.forecast import Forecast, StageState, UnitState, forecast, planned_run

RECORDINGS = sorted(Path(__file__).with_name("forecasts").glob("*.json"))
SHARES = (0.34, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclasses.dataclass(frozen=True)
class Recording:
    document: dict[str, Any]

    @property
    def seconds(self) -> float:
        return float(self.document["ended"])

    def forecast_at(self, now: float) -> Forecast:
        plan = planned_run(self.document["plan"])
        assert plan is not None
        stages = [_stage(*stage, now) for stage in self.document["stages"]]
        units = [_unit(unit, now) for unit in self.document["units"] if unit["started"] <= now]
        found = forecast(plan, stages, units, now=now, spent=0.0)
        assert found is not None
        return found


def _stage(name: str, status: str, started: float | None, seconds: float | None, now: float) -> StageState:
    if status == "reused":
        return StageState(name, "reused", None, None)
    assert started is not None
    assert seconds is not None
    if now >= started + seconds:
        return StageState(name, "done", started, seconds)
    return StageState(name, "running", started, None) if now >= started else StageState(name, "waiting", None, None)


def _unit(unit: dict[str, Any], now: float) -> UnitState:
    steps = [step for time, step in unit["progress"] if time <= now]
    done = unit["ended"] <= now
    return UnitState(
        unit["stage"],
        done,
        step=steps[-1] if steps else 0,
        steps=unit["steps"],
        started=unit["started"],
        ended=unit["ended"] if done else None,
    )


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_the_end_is_foreseen_within_20_percent_from_the_first_third_on(path: Path) -> None:
    run = Recording(json.loads(path.read_text(encoding="utf-8")))
    ends = {share: run.forecast_at(share * run.seconds).ends for share in SHARES}
    errors = {share: round(end / run.seconds - 1, 3) for share, end in ends.items()}
    assert max(map(abs, errors.values())) <= 0.2, errors
