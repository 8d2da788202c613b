from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.database.metrics import downsample

CURVES = st.lists(st.floats(-1e6, 1e6), max_size=400)
MOST = st.integers(4, 100)
UNHURRIED = settings(deadline=None)


@UNHURRIED
@given(CURVES, MOST)
def test_the_ends_and_the_extremes_survive(values, most):
    kept = downsample(values, most)
    if values:
        assert (kept[0], kept[-1]) == (0, len(values) - 1)
        assert min(values[at] for at in kept) == min(values)
        assert max(values[at] for at in kept) == max(values)


@UNHURRIED
@given(CURVES, MOST)
def test_no_more_points_are_kept_than_asked_for_and_each_once_in_order(values, most):
    kept = downsample(values, most)
    assert len(kept) <= most
    assert kept == sorted(set(kept))


@UNHURRIED
@given(CURVES, st.integers(400, 500))
def test_a_short_curve_stays_whole(values, most):
    assert downsample(values, most) == list(range(len(values)))


@UNHURRIED
@given(st.integers(10, 2000), st.integers(10, 200), st.data())
def test_a_single_spike_anywhere_survives(count, most, data):
    spike = data.draw(st.integers(0, count - 1))
    values = [0.0] * count
    values[spike] = data.draw(st.sampled_from([-1.0, 1.0]))
    assert spike in downsample(values, most)


@UNHURRIED
@given(st.integers(100, 3000), st.integers(10, 100))
def test_what_is_kept_is_spread_evenly(count, most):
    kept = downsample([float(number) for number in range(count)], most)
    widest = max(then - now for now, then in itertools.pairwise(kept))
    assert widest <= 2 + 2 * count // ((most - 2) // 2)


@pytest.mark.parametrize("most", [-1, 0, 1, 2, 3])
def test_below_four_points_the_ends_and_the_extremes_remain(most):
    assert downsample([0.0, 5.0, -5.0, 1.0, 0.0], most) == [0, 1, 2, 4]
