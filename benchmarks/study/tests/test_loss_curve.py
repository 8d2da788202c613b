from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import curve_fit

from benchmarks.study.advice.loss_curve import Curve, Size, fit_curve, through_one

curves = st.builds(
    Curve, unit=st.floats(1e5, 1e9), level=st.floats(1, 9), slope=st.floats(0.05, 2),
    exponent=st.one_of(st.just(0.0), st.floats(0.02, 1)))


def law(floor: float, scale: float, exponent: float, tokens: float) -> float:
    return floor + scale * tokens**-exponent


def test_two_sizes_are_a_straight_line_over_the_logarithm_of_tokens() -> None:
    curve = fit_curve([Size(1_000_000, 4.0), Size(4_000_000, 3.5)])
    assert curve.loss(2_000_000) == pytest.approx(3.75)
    assert curve.loss(16_000_000) == pytest.approx(3.0)
    assert curve.tokens(3.0) == pytest.approx(16_000_000)
    assert curve.floor == -math.inf


def test_a_size_counts_as_often_as_it_was_run() -> None:
    points = [Size(1_000, 4.0), Size(2_000, 3.0, runs=2), Size(4_000, 3.2)]
    each = [Size(1_000, 4.0), Size(2_000, 3.0), Size(2_000, 3.0), Size(4_000, 3.2)]
    assert fit_curve(points).loss(8_000) == pytest.approx(fit_curve(each).loss(8_000))


@given(st.floats(0, 3), st.floats(0.05, 1.0), st.floats(0.3, 4))
def test_an_exact_law_is_recovered(floor: float, exponent: float, fall: float) -> None:
    scale = fall * 1e6**exponent     # the part above the floor is `fall` at a million tokens
    curve = fit_curve([Size(tokens, law(floor, scale, exponent, tokens)) for tokens in (10**6, 3 * 10**6, 10**7, 3 * 10**7)])
    assert curve.exponent == pytest.approx(exponent, abs=2e-3)
    assert curve.floor == pytest.approx(floor, abs=2e-2 * max(1, fall / exponent))
    for tokens in (2e6, 3e8):
        assert curve.loss(tokens) == pytest.approx(law(floor, scale, exponent, tokens), abs=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_no_worse_than_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = np.array([1e6, 2e6, 5e6, 1e7, 4e7])
    losses = law(2.0, 60.0, 0.25, tokens) + rng.normal(0, 0.01, 5)
    curve = fit_curve([Size(int(x), float(loss)) for x, loss in zip(tokens, losses, strict=True)])
    ours = sum((curve.loss(x) - loss) ** 2 for x, loss in zip(tokens, losses, strict=True))
    found, _ = curve_fit(
        lambda x, floor, fall, exponent: floor + fall * (x / 1e6) ** -exponent, tokens, losses, p0=(2.0, 1.9, 0.25),
        bounds=([-50, 0, 0.01], [9, 60, 2]), max_nfev=20_000)
    theirs = sum((found[0] + found[1] * (x / 1e6) ** -found[2] - loss) ** 2 for x, loss in zip(tokens, losses, strict=True))
    assert ours <= theirs * 1.001 + 1e-12


@given(curves, st.floats(1e4, 1e11), st.floats(1, 100))
def test_more_tokens_never_have_more_loss(curve: Curve, tokens: float, more: float) -> None:
    assert curve.loss(tokens * more) <= curve.loss(tokens) + 1e-9
    assert curve.loss(tokens) >= curve.floor - 1e-9


@given(curves, st.floats(0.05, 50))
def test_tokens_are_the_inverse(curve: Curve, times: float) -> None:
    tokens = curve.unit * times
    assert curve.tokens(curve.loss(tokens)) == pytest.approx(tokens, rel=1e-4)


@given(st.lists(st.floats(1, 9), min_size=2, max_size=5))
def test_a_fitted_curve_never_rises(losses: list[float]) -> None:
    curve = fit_curve([Size(10**6 * 2**i, loss) for i, loss in enumerate(losses)])
    assert curve.slope >= 0
    if losses == sorted(losses):
        assert curve.loss(10**9) == pytest.approx(sum(losses) / len(losses))


def test_below_its_floor_nothing_comes() -> None:
    curve = Curve(unit=1e6, level=4.0, slope=0.5, exponent=0.25)
    assert curve.floor == pytest.approx(2.0)
    assert curve.tokens(1.99) == math.inf
    assert Curve(1e6, 4.0, 0.0).tokens(3.9) == math.inf
    assert Curve(1e6, 4.0, 1e-3).tokens(1.0) == math.inf     # e^3000 tokens


def test_one_size_is_as_steep_as_the_others_are_there() -> None:
    line, bent = Curve(1e6, 4.0, 0.5), Curve(1e6, 4.0, 0.8, 0.5)
    curve = through_one(Size(4_000_000, 3.0), [line, bent])
    assert curve.loss(4e6) == 3.0
    assert curve.slope == pytest.approx((0.5 + 0.8 * 4**-0.5) / 2)
    assert curve.exponent == 0.25
