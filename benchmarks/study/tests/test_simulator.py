"""The simulator's accounts add up, and it never beats a bound that holds for every policy."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.study.simulation import phase, setting, state


@pytest.fixture(scope="module")
def simulation() -> Any:
    return SimpleNamespace(state=state, phase=phase, setting=setting)


def run(simulation: Any, seed: int = 0, **changes: Any) -> Any:
    return simulation.phase.Phase(simulation.setting.Setting(submodels=24, mean_hours=1.0, **changes), seed).run()


def test_an_undisturbed_phase_on_enough_perfect_machines_is_the_bound(simulation: Any) -> None:
    outcome = run(simulation, boot=0.0, restart=0.0, stall=0.0, latency=0.0, failures_per_hour=0.0, every=1e9)
    assert outcome.makespan == pytest.approx(outcome.bound)
    assert outcome.dollars == pytest.approx(outcome.bound_dollars)
    assert (outcome.losses, outcome.lost_hours, outcome.finished) == (0, 0.0, 24)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"at_once": 5},
        {"losses_per_hour": 0.7},
        {"losses_per_hour": 0.7, "heard": 1.0, "at_once": 5},
        {"losses_per_hour": 0.7, "together": 0.5, "zones": 3},
        {"losses_per_hour": 5.0, "at_once": 3},
        {"losses_per_hour": 0.7, "every": 600.0, "order": "as_given"},
    ],
)
def test_no_policy_beats_the_bounds_and_every_run_ends(simulation: Any, changes: dict[str, Any]) -> None:
    for seed in range(2):
        outcome = run(simulation, seed, **changes)
        assert outcome.finished == 24
        assert outcome.makespan >= outcome.bound
        assert outcome.dollars >= outcome.bound_dollars


def test_equal_seeds_make_equal_runs(simulation: Any) -> None:
    changes = {"losses_per_hour": 0.7, "together": 0.5, "heard": 0.5, "at_once": 10}
    assert run(simulation, 3, **changes) == run(simulation, 3, **changes)
    assert run(simulation, 3, **changes) != run(simulation, 4, **changes)


def test_a_heard_notice_loses_no_work(simulation: Any) -> None:
    heard, unheard = (run(simulation, losses_per_hour=0.7, failures_per_hour=0.0, heard=share) for share in (1.0, 0.0))
    assert heard.losses > 5
    assert heard.lost_hours == 0.0
    assert unheard.lost_hours > 0.0


def test_longest_first_ends_sooner_on_few_machines(simulation: Any) -> None:
    def total_makespan(order: str) -> float:
        return sum(run(simulation, seed, at_once=6, order=order).makespan for seed in range(4))

    assert total_makespan("longest_first") < total_makespan("as_given")


def test_expensive_nodes_in_time_idle_less_than_those_asked_for_at_the_start(simulation: Any) -> None:
    early, in_time, late = (run(simulation, ask=ask) for ask in ("at_start", "in_time", "at_end"))
    assert in_time.idle_dollars < early.idle_dollars / 10
    assert in_time.late < late.late


def test_large_submodels_go_to_large_machines_and_small_ones_to_the_cheapest(simulation: Any) -> None:
    kinds = (simulation.setting.Kind("24gb", 24.0, 0.35, 1.0, 50), simulation.setting.Kind("48gb", 48.0, 0.8, 1.2, 50))
    mixed = run(simulation, kinds=kinds, large_share=0.3)
    large = run(simulation, kinds=kinds[1:], large_share=0.3)
    assert mixed.finished == large.finished == 24
    assert mixed.dollars < large.dollars


def test_an_attempt_is_what_its_seconds_add_up_to(simulation: Any) -> None:
    rng = random.Random(0)
    for _ in range(50):
        interval, stall = rng.randint(5, 30), rng.randint(0, 4)
        latency, work = stall + rng.randint(0, 5), rng.randint(1, 200)
        attempt = simulation.state.Attempt(
            None, 100.0, 0.0, 0.0, float(work), 1.0, float(interval), float(stall), float(latency)
        )
        done = saved = 0
        under_way: list[tuple[float, int]] = []  # checkpoints that are not safe yet
        clock = 100
        while done < work:
            for safe_at, held in list(under_way):
                if clock >= safe_at:
                    saved = held
                    under_way.remove((safe_at, held))
            assert attempt.done(clock) == pytest.approx(done)
            assert attempt.saved(clock) == pytest.approx(saved)
            done += 1
            clock += 1
            if done % interval == 0 and done < work:
                under_way.append((clock + latency, done))
                clock += stall
        assert attempt.ends == pytest.approx(clock + latency)
