from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from moedisco_ray.router_init import (
    centroid_directions,
    directions,
    random_directions,
    ridge_directions,
    ridge_solution,
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
    found = ridge_directions(total, strength)
    centred = reference - reference.mean(0)
    ratio = found.numpy() / centred
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)
    assert ratio[0, 0] > 0


@pytest.mark.parametrize("method", ["ridge", "centroid", "random"])
def test_logits_have_unit_root_mean_square_and_sum_zero(method):
    x, label = data()
    w = directions(method, statistics(x, label, 3), seed=1)
    logits = x @ w.T
    assert float(logits.square().mean().sqrt()) == pytest.approx(1, rel=1e-9)
    torch.testing.assert_close(logits.sum(1), torch.zeros(len(x), dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", ["ridge", "centroid"])
def test_separated_clusters_are_found_and_random_rows_do_not_find_them(method):
    x, label = data(clusters=4, dimensions=24, spread=0.3)
    total = statistics(x, label, 4)
    accuracy = {name: float(((x @ directions(name, total, 1).T).argmax(1) == label).double().mean())
                for name in (method, "random")}
    assert accuracy[method] > 0.98
    assert accuracy["random"] < 0.7


def test_statistics_add_up_over_any_blocks():
    x, label = data()
    whole = statistics(x, label, 3)
    bounds = [0, 1, 100, 377, len(x)]
    parts = [statistics(x[a:b], label[a:b], 3) for a, b in itertools.pairwise(bounds)]
    total = parts[3] + parts[0] + parts[2] + parts[1]
    for field in ("xx_DD", "xy_DC", "unit_DC", "count_C"):
        torch.testing.assert_close(getattr(total, field), getattr(whole, field), rtol=1e-12, atol=1e-10)
        assert getattr(total, field).dtype == torch.float64


def test_centroids_are_spherical():
    x, label = data()
    scaled = x * torch.linspace(0.1, 10, len(x), dtype=torch.float64)[:, None]
    one, two = (centroid_directions(statistics(rows, label, 3)) for rows in (x, scaled))
    cosine = torch.nn.functional.cosine_similarity(one, two)
    torch.testing.assert_close(cosine, torch.ones(3, dtype=torch.float64))


def test_a_half_precision_input_is_summed_in_float64():
    x, label = data(tokens=200)
    low = statistics(x.bfloat16(), label, 3)
    torch.testing.assert_close(low.xx_DD, x.bfloat16().double().T @ x.bfloat16().double(), rtol=1e-14, atol=0)


def test_degenerate_data_gives_finite_rows():
    x, label = data()
    assert not ridge_directions(statistics(x, torch.zeros_like(label), 1)).any()
    empty_cluster = ridge_directions(statistics(x, label.clamp(max=1), 3))
    assert torch.isfinite(empty_cluster).all()
    assert torch.isfinite(centroid_directions(statistics(x, label.clamp(max=1), 3))).all()
    few = statistics(x[:4], label[:4], 3)     # fewer tokens than dimensions: only the ridge makes it solvable
    assert torch.isfinite(ridge_directions(few)).all()


def test_random_directions_depend_on_the_seed_alone():
    total = statistics(*data(), 3)
    assert torch.equal(random_directions(total, 4), random_directions(total, 4))
    assert not torch.equal(random_directions(total, 4), random_directions(total, 5))
