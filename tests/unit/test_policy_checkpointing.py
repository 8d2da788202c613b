"""The interval is the best there is, and stays within its bounds."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.policies.checkpointing import (
    HOUR,
    Bounds,
    Prior,
    SaveCost,
    best_interval,
    expected_stretch,
    interval,
    loss_rate,
)

stalls = st.floats(0.01, 120)
mean_times = st.floats(300, 1e7)


@given(stalls, mean_times, st.floats(0.02, 50), st.floats(0, 600))
def test_no_other_interval_costs_noticeably_less(stall: float, mean_time: float, factor: float, restart: float) -> None:
    best = best_interval(stall, mean_time)
    ours = expected_stretch(best, stall, mean_time, restart)
    # The estimate is of second order: where a checkpoint costs a third of the time between losses it is off by 2e-3.
    assert ours <= expected_stretch(best * factor, stall, mean_time, restart) * (1 + 3e-3)


@given(stalls, st.floats(1e4, 1e7))
def test_its_neighbours_cost_more_where_checkpoints_are_cheap(stall: float, mean_time: float) -> None:
    best = best_interval(stall, mean_time)
    ours = expected_stretch(best, stall, mean_time)
    assert ours < expected_stretch(best * 1.3, stall, mean_time)
    assert ours < expected_stretch(best / 1.3, stall, mean_time)


def test_it_is_youngs_where_checkpoints_are_cheap() -> None:
    assert best_interval(1.0, 1e6) == pytest.approx(math.sqrt(2e6), rel=2e-3)


def test_where_a_checkpoint_takes_as_long_as_a_loss_comes_it_is_the_time_between_losses() -> None:
    assert best_interval(100.0, 40.0) == 40.0


@given(stalls, mean_times, st.floats(1.01, 10))
def test_rarer_losses_and_dearer_checkpoints_both_lengthen_it(stall: float, mean_time: float, factor: float) -> None:
    assert best_interval(stall, mean_time * factor) > best_interval(stall, mean_time)
    if stall * factor < mean_time / 2:
        assert best_interval(stall * factor, mean_time) > best_interval(stall, mean_time)


@given(stalls, st.floats(0, 10), st.integers(1, 64), st.floats(0, 2000))
def test_bounds_hold_and_training_never_stalls_more_than_allowed(
    stall: float, rate: float, workers: int, latency: float
) -> None:
    bounds = Bounds(shortest=20, longest=900, stall=0.05)
    seconds = interval(SaveCost(stall, latency), rate, workers, bounds)
    assert stall / (seconds + stall) <= bounds.stall * (1 + 1e-9)
    assert seconds >= max(bounds.shortest, latency)
    assert seconds <= max(bounds.longest, 19 * stall * (1 + 1e-9), latency)


def test_the_gangs_losses_are_those_of_all_its_workers() -> None:
    free = Bounds(0.1, 1e9, 1.0)
    assert interval(SaveCost(1.0), 0.8, 1, free) == interval(SaveCost(1.0), 0.1, 8, free)
    assert interval(SaveCost(1.0), 0.0, 8, free) == free.longest


@given(st.integers(0, 1000), st.floats(0, 1e5))
def test_an_estimate_lies_between_the_assumption_and_the_measurement(losses: int, hours: float) -> None:
    prior = Prior(0.1, 10)
    measured = losses / hours if hours else prior.per_hour
    rate = loss_rate(losses, hours, prior)
    if hours:
        assert min(measured, prior.per_hour) - 1e-9 <= rate <= max(measured, prior.per_hour) + 1e-9
    assert rate > 0


def test_watching_long_forgets_the_assumption() -> None:
    assert loss_rate(0, 0) == pytest.approx(0.1)
    assert loss_rate(500, 1000) == pytest.approx(0.5, rel=0.01)


@given(st.integers(0, 100), st.floats(0, 1e4), st.floats(0.1, 1e4), stalls, st.integers(1, 64))
def test_hours_without_a_loss_lower_the_rate_and_lengthen_the_interval_and_a_loss_does_the_opposite(
    losses: int, hours: float, more: float, stall: float, workers: int
) -> None:
    before, calm, struck = loss_rate(losses, hours), loss_rate(losses, hours + more), loss_rate(losses + 1, hours)
    assert calm < before < struck
    shorter, now, longer = (interval(SaveCost(stall), rate, workers) for rate in (struck, before, calm))
    assert shorter <= now * (1 + 1e-9)
    assert now <= longer * (1 + 1e-9)


def test_the_model_predicts_what_a_simulation_takes() -> None:
    work, every, stall, mean_time, restart = 20_000.0, 120.0, 6.0, 900.0, 60.0
    chance = random.Random(0)
    total = sum(simulated(work, every, stall, mean_time, restart, chance) for _ in range(200)) / 200
    assert total / work == pytest.approx(expected_stretch(every, stall, mean_time, restart), rel=0.03)


def simulated(
    work: float, every: float, stall: float, mean_time: float, restart: float, chance: random.Random
) -> float:
    done = clock = 0.0
    until_loss = chance.expovariate(1 / mean_time)
    down = 0.0
    while done < work:
        segment = down + min(every, work - done) + stall
        if until_loss >= segment:
            clock, until_loss, done, down = clock + segment, until_loss - segment, done + every, 0.0
        else:
            clock, until_loss, down = clock + until_loss, chance.expovariate(1 / mean_time), restart
    return clock


def test_a_training_that_never_ends_is_told_so() -> None:
    assert expected_stretch(HOUR, 1.0, 1.0) == math.inf
    assert expected_stretch(100.0, 5.0, math.inf) == pytest.approx(1.05)
