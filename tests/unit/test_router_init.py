from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import Ridge

from moedisco_ray.stages.merge.router_init import (
    constant_direction,
    directions,
    load_offsets,
    random_directions,
    ridge_directions,
    ridge_solution,
    ridge_strength,
    statistics,
)


def data(tokens=600, dimensions=12, clusters=3, seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, dimensions, generator=generator, dtype=torch.float64)
    label = torch.randint(0, clusters, (tokens,), generator=generator)
    return centres[label] + spread * torch.randn(tokens, dimensions, generator=generator, dtype=torch.float64), label


@pytest.mark.parametrize("strength", [1e-6, 1e-3, 10.0])
def test_ridge_equals_scikit_learn(strength):
    x, label = data()
    total = statistics(x, label, 3)
    one_hot = np.eye(3)[label.numpy()]
    lam = strength * float(total.xx_DD.diagonal().mean())
    reference = Ridge(alpha=lam, fit_intercept=False).fit(x.numpy(), one_hot).coef_
    np.testing.assert_allclose(ridge_solution(total, lam).T.numpy(), reference, rtol=1e-8, atol=1e-10)


def test_ridge_directions_are_scikit_learns_at_the_chosen_strength():
    x, label = data()
    total = statistics(x, label, 3)
    reference = Ridge(alpha=ridge_strength(total), fit_intercept=False).fit(x.numpy(), np.eye(3)[label.numpy()]).coef_
    found = ridge_directions(total)
    centred = reference - reference.mean(0)
    ratio = found.numpy() / centred
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
    assert ratio[0, 0] > 0


@pytest.mark.parametrize("method", ["ridge", "random"])
def test_logits_have_unit_root_mean_square_and_sum_zero(method):
    x, label = data()
    w = directions(method, statistics(x, label, 3), seed=1)
    logits = x @ w.T
    assert float(logits.square().mean().sqrt()) == pytest.approx(1, rel=1e-9)
    torch.testing.assert_close(logits.sum(1), torch.zeros(len(x), dtype=torch.float64), atol=1e-9, rtol=0)


def test_separated_clusters_are_found_and_random_rows_do_not_find_them():
    x, label = data(clusters=4, dimensions=24, spread=0.3)
    total = statistics(x, label, 4)
    accuracy = {
        name: float(((x @ directions(name, total, 1).T).argmax(1) == label).double().mean())
        for name in ("ridge", "random")
    }
    assert accuracy["ridge"] > 0.98
    assert accuracy["random"] < 0.7


@pytest.mark.parametrize(("tokens", "spread"), [(600, 0.5), (60, 3.0), (30, 8.0), (8, 0.5)])
def test_the_strength_has_the_least_cross_validation_error_of_its_grid(tokens, spread):
    x, label = data(tokens, spread=spread)
    total = statistics(x, label, 3)
    y = torch.nn.functional.one_hot(label, 3).double()
    errors = {}
    for power in range(-2, 3):
        lam = 10.0**power * float(total.xx_DD.diagonal().mean())
        hat = x @ torch.linalg.solve(x.T @ x + lam * torch.eye(12, dtype=torch.float64), x.T)
        errors[lam] = float((y - hat @ y).square().sum() / (tokens - hat.trace()).square())
    least = min(errors.values())
    assert (
        min(error for lam, error in errors.items() if lam == pytest.approx(ridge_strength(total), rel=1e-6))
        <= least * 1.0001
    )


def test_noise_asks_for_a_stronger_ridge():
    few, many = (ridge_strength(statistics(*data(tokens, spread=8.0), 3)) / tokens for tokens in (40, 20_000))
    assert few > 10 * many


def rows(seed, tokens=2000, clusters=4):
    """Logits of correlated clusters with unequal favour."""
    generator = torch.Generator().manual_seed(seed)
    favour = 2 * torch.randn(clusters, generator=generator, dtype=torch.float64)
    common = torch.randn(tokens, 1, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, clusters, generator=generator, dtype=torch.float64) + common + favour


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_offsets_give_every_cluster_its_share(seed, parts):
    share = torch.tensor(parts, dtype=torch.float64) / sum(parts)
    logits = rows(seed, clusters=len(parts))
    offsets = load_offsets(logits, share)
    load = torch.bincount((logits + offsets).argmax(1), minlength=len(parts)) / len(logits)
    assert float((load - share).abs().max()) <= 0.002
    assert float(offsets.sum()) == pytest.approx(0, abs=1e-9)


def test_offsets_minimise_the_convex_problem_whose_gradient_is_the_load():
    logits, share = rows(3, clusters=3), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)

    def value(offsets):
        return float((logits + torch.as_tensor(offsets)).amax(1).mean()) - float(share @ torch.as_tensor(offsets))

    found = load_offsets(logits, share)
    reference = minimize(
        value, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10, "maxiter": 4000}
    )
    assert value(found) <= reference.fun + 1e-5
    np.testing.assert_allclose(found.numpy(), reference.x - reference.x.mean(), atol=0.02)


def test_the_order_of_tokens_does_not_change_offsets():
    logits, share = rows(4), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert torch.equal(load_offsets(logits, share), load_offsets(logits.flip(0), share))


def test_the_constant_direction_regresses_the_number_1():
    x, label = data()
    x[:, 0] += 3
    total = statistics(x, label, 3)
    reference = Ridge(alpha=0.01 * float(total.xx_DD.diagonal().mean()), fit_intercept=False).fit(
        x.numpy(), np.ones(len(x))
    )
    np.testing.assert_allclose(constant_direction(total).numpy(), reference.coef_, rtol=1e-6, atol=1e-9)


def test_rows_keep_their_size_where_inputs_hardly_differ():
    """A direction of the inputs that hardly separates clusters would get a row that training cannot move."""
    x, label = data(tokens=4000, spread=1.0)
    told = torch.nn.functional.one_hot(label, 3).double() @ torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    thin = torch.cat([x, 1e-4 * told], dim=1)
    with_it, without = (directions("ridge", statistics(each, label, 3), 0).norm() for each in (thin, x))
    assert with_it < 1.5 * without


def test_statistics_add_up_over_any_blocks():
    x, label = data()
    whole = statistics(x, label, 3)
    bounds = [0, 1, 100, 377, len(x)]
    parts = [statistics(x[a:b], label[a:b], 3) for a, b in itertools.pairwise(bounds)]
    total = parts[3] + parts[0] + parts[2] + parts[1]
    for field in ("xx_DD", "xy_DC", "count_C"):
        torch.testing.assert_close(getattr(total, field), getattr(whole, field), rtol=1e-12, atol=1e-10)
        assert getattr(total, field).dtype == torch.float64


def test_a_half_precision_input_is_summed_in_float64():
    x, label = data(tokens=200)
    low = statistics(x.bfloat16(), label, 3)
    torch.testing.assert_close(low.xx_DD, x.bfloat16().double().T @ x.bfloat16().double(), rtol=1e-14, atol=0)


def test_degenerate_data_gives_finite_rows():
    x, label = data()
    assert not ridge_directions(statistics(x, torch.zeros_like(label), 1)).any()
    empty_cluster = ridge_directions(statistics(x, label.clamp(max=1), 3))
    assert torch.isfinite(empty_cluster).all()
    few = statistics(x[:4], label[:4], 3)  # fewer tokens than dimensions: only the ridge makes it solvable
    assert torch.isfinite(ridge_directions(few)).all()


def test_random_directions_depend_on_the_seed_alone():
    total = statistics(*data(), 3)
    assert torch.equal(random_directions(total, 4), random_directions(total, 4))
    assert not torch.equal(random_directions(total, 4), random_directions(total, 5))
