"""Longest first, and the laws of list scheduling."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.study.simulation.phase import makespan_bound
from moedisco_ray.policies.ordering import (
    Remaining,
    calibration,
    expected_seconds,
    finish_times,
    longest_first,
    soonest_done,
)

seconds = st.floats(0.1, 1e4)
works = st.lists(seconds, min_size=1, max_size=7)


def remaining(name: str, work: float) -> Remaining:
    return Remaining(name, 1, work)


def makespan(work: list[float], slots: int) -> float:
    return max(finish_times([], work, slots))


def best_makespan(work: list[float], slots: int) -> float:
    """Over all orders: one of them, list-scheduled, is the best schedule there is."""
    return min(makespan(list(order), slots) for order in itertools.permutations(work))


def units_of(work: list[float]) -> list[Remaining]:
    return [remaining(str(k), value) for k, value in enumerate(work)]


def planned(units: list[Remaining]) -> list[float]:
    return [unit.planned for unit in units]


def longest_first_of(work: list[float]) -> list[float]:
    return planned(longest_first(units_of(work)))


@given(works, st.integers(1, 4))
def test_longest_first_keeps_grahams_bound(work: list[float], slots: int) -> None:
    best = best_makespan(work, slots)
    assert makespan(longest_first_of(work), slots) <= (4 / 3 - 1 / (3 * slots)) * best * (1 + 1e-9)


@given(works, st.integers(1, 9))
def test_no_order_beats_the_bound(work: list[float], slots: int) -> None:
    assert makespan(longest_first_of(work), slots) >= makespan_bound(work, slots) * (1 - 1e-9)


@given(works)
def test_with_a_slot_for_each_the_longest_is_the_makespan(work: list[float]) -> None:
    assert makespan(work, len(work)) == pytest.approx(max(work))


@given(works)
def test_on_one_slot_the_order_does_not_matter(work: list[float]) -> None:
    assert makespan(work, 1) == pytest.approx(sum(work))


@given(st.lists(st.tuples(st.integers(1, 1000), seconds), min_size=1, max_size=20))
def test_the_order_is_a_permutation_from_long_to_short(units: list[tuple[int, float]]) -> None:
    given_units = [Remaining(str(k), steps, planned) for k, (steps, planned) in enumerate(units)]
    order = longest_first(given_units)
    assert sorted(unit.name for unit in order) == sorted(unit.name for unit in given_units)
    times = [expected_seconds(unit) for unit in order]
    assert times == sorted(times, reverse=True)


@given(st.lists(st.tuples(st.integers(1, 1000), seconds, st.booleans()), min_size=1, max_size=20), st.floats(0.01, 100))
def test_a_plan_that_is_wrong_by_one_factor_orders_like_a_right_one(
    units: list[tuple[int, float, bool]], factor: float
) -> None:
    wrong = [Remaining(str(k), n, plan, plan * factor if ran else None) for k, (n, plan, ran) in enumerate(units)]
    right = [Remaining(str(k), n, plan) for k, (n, plan, _) in enumerate(units)]
    times = {unit.name: expected_seconds(unit) for unit in right}
    ordered = [times[unit.name] for unit in longest_first(wrong)]
    assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(ordered))


@given(works, st.lists(seconds, max_size=4), st.integers(1, 5))
def test_exchanging_pairs_is_never_worse_than_longest_first(
    work: list[float], running: list[float], slots: int
) -> None:
    units = units_of(work)
    order = soonest_done(units, running, slots)
    assert sorted(unit.name for unit in order) == sorted(unit.name for unit in units)
    end, before = (max(finish_times(running, planned(each), slots)) for each in (order, longest_first(units)))
    assert end <= before
    assert order == longest_first(units) or end < before * 0.996


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_it_finds_the_best_schedule_of_the_benchmarks_sub_models(slots: int) -> None:
    shares = [1.8, 1.5, 1.2, 1.1, 0.9, 0.8, 0.5, 0.2]
    order = soonest_done(units_of(shares), [], slots)

    def last_end(places: tuple[int, ...]) -> float:
        ends = [0.0] * slots
        for share, place in zip(shares, places, strict=True):
            ends[place] += share
        return max(ends)

    best = min(map(last_end, itertools.product(range(slots), repeat=len(shares))))
    assert makespan(planned(order), slots) == pytest.approx(best)


def test_many_units_and_an_empty_pool_are_left_longest_first() -> None:
    shares = [1.8, 1.5, 1.2, 1.1, 0.9, 0.8, 0.5, 0.2]
    few = [remaining(str(k), share) for k, share in enumerate(shares)]
    many = [remaining(f"{n}-{k}", share) for n in range(4) for k, share in enumerate(shares)]
    assert soonest_done(few, [], 0) == longest_first(few)
    assert soonest_done(many, [], 3) == longest_first(many)


def test_what_was_measured_corrects_the_plan_of_what_never_ran() -> None:
    ran, waits = Remaining("ran", 100, 1.0, 3.0), Remaining("waits", 150, 1.0)
    assert calibration([ran, waits]) == 3.0
    assert expected_seconds(waits, 3.0) == 450
    assert longest_first([ran, waits]) == [waits, ran]


def test_equals_keep_their_order() -> None:
    units = [remaining(name, 5.0) for name in "cab"]
    assert longest_first(units) == units


def test_running_units_hold_their_slots() -> None:
    assert finish_times([10.0, 4.0], [3.0, 3.0], 2) == [10.0, 4.0, 7.0, 10.0]


def test_slots_of_a_pool_that_shrank_are_not_taken_again() -> None:
    assert finish_times([10.0, 4.0], [3.0], 1) == [10.0, 4.0, 13.0]


def test_what_waits_without_a_slot_never_starts() -> None:
    with pytest.raises(ValueError, match="needs at least one slot"):
        finish_times([], [1.0], 0)
    assert finish_times([], [], 0) == []
    assert makespan_bound([], 1) == 0
    assert math.isclose(makespan_bound([1.0, 1.0, 4.0], 2), 4.0)
