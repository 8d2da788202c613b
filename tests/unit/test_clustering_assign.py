"""Laws of balanced assignment."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moedisco_ray.stages.clustering.assign import assign_balanced


def ids_of(n, salt=0):
    return np.array([hashlib.blake2b(f"{salt}-{i}".encode(), digest_size=16).digest() for i in range(n)], dtype="S16")


def problem(n, e, seed, heavy=False):
    generator = np.random.default_rng(seed)
    skew_E = np.linspace(0, 1.5, e)  # most documents are nearest to the first clusters
    d_NE = (generator.random((n, e)) + skew_E).astype(np.float32)
    weights_N = generator.integers(1, 50, n) if heavy else np.ones(n, np.int64)
    return d_NE, weights_N, ids_of(n, seed)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.sampled_from([1.0, 1.05, 1.5]))
def test_no_cluster_exceeds_the_capacity(seed, e, capacity):
    d_NE, weights_N, ids_N = problem(100 * e, e, seed)
    clusters_N, prices_E = assign_balanced(d_NE, weights_N, ids_N, capacity)
    assert np.bincount(clusters_N, minlength=e).max() <= capacity * 100
    assert prices_E.shape == (e,)
    assert (prices_E >= 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_heavy_documents_exceed_it_by_less_than_one_of_them(seed, e):
    d_NE, weights_N, ids_N = problem(40, e, seed, heavy=True)
    clusters_N, _ = assign_balanced(d_NE, weights_N, ids_N, 1.0)
    loads_E = np.bincount(clusters_N, weights_N, minlength=e)
    for k in range(e):
        inside = weights_N[clusters_N == k]
        assert loads_E[k] <= weights_N.sum() / e + (inside.min() if len(inside) else 0)


def test_many_uneven_documents_fit_exactly():
    d_NE, weights_N, ids_N = problem(4000, 8, 3, heavy=True)
    clusters_N, _ = assign_balanced(d_NE, weights_N, ids_N, 1.05)
    assert np.bincount(clusters_N, weights_N).max() <= 1.05 * weights_N.sum() / 8


def test_a_document_heavier_than_a_cluster_ends_alone():
    d_NE = np.zeros((31, 3), np.float32) + np.array([0, 1, 2], np.float32)
    weights_N = np.array([100, *[1] * 30])
    clusters_N, _ = assign_balanced(d_NE, weights_N, ids_of(31), 1.05)
    assert (clusters_N[1:] != clusters_N[0]).all()


@pytest.mark.parametrize("seed", range(8))
def test_cost_is_near_the_optimum_of_the_assignment_problem(seed):
    e, each = 4, 15
    d_NE, weights_N, ids_N = problem(e * each, e, seed)
    clusters_N, _ = assign_balanced(d_NE, weights_N, ids_N, 1.0)
    rows, columns = linear_sum_assignment(np.repeat(d_NE, each, axis=1))
    optimum = d_NE[rows, columns // each].sum()
    assert d_NE[np.arange(len(d_NE)), clusters_N].sum() <= 1.02 * optimum


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_order_of_documents_does_not_matter(seed):
    d_NE, weights_N, ids_N = problem(150, 4, seed, heavy=True)
    order = np.random.default_rng(seed).permutation(150)
    clusters_N, prices_E = assign_balanced(d_NE, weights_N, ids_N, 1.05)
    permuted_N, permuted_E = assign_balanced(d_NE[order], weights_N[order], ids_N[order], 1.05)
    np.testing.assert_array_equal(clusters_N[order], permuted_N)
    np.testing.assert_array_equal(prices_E, permuted_E)


def test_without_a_capacity_the_nearest_wins():
    d_NE, weights_N, ids_N = problem(100, 5, 0)
    clusters_N, prices_E = assign_balanced(d_NE, weights_N, ids_N, None)
    np.testing.assert_array_equal(clusters_N, d_NE.argmin(axis=1))
    assert not prices_E.any()


def test_clusters_within_the_capacity_are_left_as_they_are():
    d_NE = np.tile(np.array([[0, 9, 9], [9, 0, 9], [9, 9, 0]], np.float32), (40, 1))
    clusters_N, _ = assign_balanced(d_NE, np.ones(120, np.int64), ids_of(120), 1.05)
    np.testing.assert_array_equal(clusters_N, np.tile([0, 1, 2], 40))
