from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.forecast import PlannedRun, StageState, UnitState, forecast, planned_run

SECONDS = {
    "corpus": 30.0,
    "cluster": 20.0,
    "seed": 300.0,
    "decompose": 5.0,
    "submodels": 600.0,
    "merge": 10.0,
    "finetune": 200.0,
    "evaluate": 40.0,
    "export": 5.0,
}
UNITS = {"seed": (1, 1), "submodels": (5, 2), "finetune": (1, 1)}
STEPS = 200
PLAN = planned_run(
    {
        "estimates": [
            {"stage": name, "seconds": seconds, "dollars": seconds / 100, "pool": "low_memory"}
            for name, seconds in SECONDS.items()
        ],
        "stages": [{"stage": name, "units": units, "workers": workers} for name, (units, workers) in UNITS.items()],
        "verdict": None,
    }
)
WAITING = [StageState(name, "waiting", None, None) for name in SECONDS]


@dataclasses.dataclass(frozen=True)
class Span:
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class TrueRun:
    """What really happens: the span of each stage, and of each training."""

    stages: dict[str, Span]
    units: list[tuple[str, Span]]

    @property
    def end(self) -> float:
        return self.stages["export"].end

    def seen_at(self, now: float) -> tuple[list[StageState], list[UnitState]]:
        return (
            [_stage(name, span, now) for name, span in self.stages.items()],
            [_unit(stage, span, now) for stage, span in self.units if span.start <= now],
        )


def _stage(name: str, span: Span, now: float) -> StageState:
    if now >= span.end:
        return StageState(name, "done", span.start, span.end - span.start)
    if now >= span.start:
        return StageState(name, "running", span.start, None)
    return StageState(name, "waiting", None, None)


def _unit(stage: str, span: Span, now: float) -> UnitState:
    share = min(1.0, (now - span.start) / (span.end - span.start))
    done = now >= span.end
    return UnitState(stage, done, int(share * STEPS), STEPS, span.start, span.end if done else None)


def _true_run(
    training: float, other: float, sizes: Sequence[float], starts: Sequence[float] = (0.0, 0.0, 0.0)
) -> TrueRun:
    clock, stages, units = 1000.0, {}, []
    for name, planned in SECONDS.items():
        if name not in UNITS:
            stages[name] = Span(clock, clock + other * planned)
        else:
            count, workers = UNITS[name]
            free = [clock + starts[list(UNITS).index(name)]] * workers
            for size in sizes[:count]:
                slot = free.index(min(free))
                seconds = training * size * planned * workers / count
                units.append((name, Span(free[slot], free[slot] + seconds)))
                free[slot] += seconds
            stages[name] = Span(clock, max(free))
        clock = stages[name].end
    return TrueRun(stages, units)


@given(
    training=st.floats(0.3, 4),
    other=st.floats(0.5, 2),
    sizes=st.lists(st.floats(0.85, 1.15), min_size=5, max_size=5),
    starts=st.lists(st.floats(0, 20), min_size=3, max_size=3),
    share=st.floats(1 / 3, 0.999),
)
def test_from_its_first_third_on_a_runs_end_is_forecast_within_a_fifth(training, other, sizes, starts, share):
    """Whatever the pace is; and no plan knows that the workers of each stage take up to 20 s to start."""
    run = _true_run(training, other, sizes, starts)
    now = 1000 + share * (run.end - 1000)
    found = forecast(PLAN, *run.seen_at(now), now=now, spent=1.0)
    assert found.ends - 1000 == pytest.approx(run.end - 1000, rel=0.2)


def test_before_its_first_step_a_run_is_forecast_as_planned():
    found = forecast(PLAN, WAITING, [], now=50.0, spent=0.0)
    assert found.ends == pytest.approx(50 + sum(SECONDS.values()))
    assert found.dollars == pytest.approx(sum(SECONDS.values()) / 100)


def test_a_finished_run_has_what_it_spent():
    run = _true_run(1, 1, [1] * 5)
    found = forecast(PLAN, *run.seen_at(run.end), now=run.end, spent=3.0)
    assert (found.ends, found.dollars) == (run.end, 3.0)


def test_taken_stages_cost_nothing_and_say_nothing_of_speed():
    taken = [StageState(s.name, "reused", None, None) if s.name in ("corpus", "seed") else s for s in WAITING]
    found = forecast(PLAN, taken, [], now=0.0, spent=0.0)
    assert found.ends == pytest.approx(sum(SECONDS.values()) - SECONDS["corpus"] - SECONDS["seed"])


def test_a_stage_that_is_overdue_without_steps_ends_a_little_later():
    late = [StageState("corpus", "running", 0.0, None), *WAITING[1:]]
    found = forecast(PLAN, late, [], now=100.0, spent=0.0)
    assert found.ends == pytest.approx(100 + 10 + sum(SECONDS.values()) - SECONDS["corpus"])


@pytest.mark.parametrize(
    "plan",
    [PlannedRun(), PLAN.model_copy(update={"estimates": PLAN.estimates[:3]})],
    ids=["nothing", "not the later stages"],
)
def test_without_a_plan_there_is_no_forecast(plan):
    assert forecast(plan, WAITING, [], now=0.0, spent=0.0) is None


def test_a_plan_of_another_form_is_no_plan():
    assert planned_run({"estimates": 3}) is None
    assert planned_run({}) == PlannedRun()
