"""Laws of k-means. Shapes: N documents, D dimensions, K clusters, R restarts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from moedisco_ray.stages.clustering.blocks import Block, squared_distances
from moedisco_ray.stages.clustering.grid import Grid, peak
from moedisco_ray.stages.clustering.kmeans import fit_kmeans, seed_centroids, update


def blobs(n=600, d=12, k=5, seed=0, spread=1.5):
    generator = np.random.default_rng(seed)
    centres = spread * generator.normal(size=(k, d))
    return (centres[generator.integers(k, size=n)] + generator.normal(size=(n, d)) + 3).astype(np.float32)


def grid_of(x_ND):
    origin_D = x_ND.mean(axis=0)
    return Grid.covering(origin_D, peak(x_ND, origin_D), len(x_ND))


def step_of(x_ND, centroids_RKD, grid):
    """A step without memory of earlier ones."""
    return Block(x_ND, grid).step(centroids_RKD, range(len(centroids_RKD)))


@given(st.integers(0, 2**32), st.integers(1, 40), st.floats(1e-6, 1e6))
def test_a_snapped_vector_is_a_float32_on_the_grid_close_to_the_original(seed, d, scale):
    x_ND = (np.random.default_rng(seed).normal(size=(50, d)) * scale).astype(np.float32)
    grid = grid_of(x_ND)
    snapped_ND = grid.snap(x_ND)
    units_ND = snapped_ND.astype(np.float64) / grid.step
    np.testing.assert_array_equal(units_ND, np.rint(units_ND))
    assert np.abs(units_ND).max() <= 2**23
    moved_ND = x_ND.astype(np.float64) - grid.origin_D
    np.testing.assert_allclose(snapped_ND.astype(np.float64), moved_ND, atol=2**-22 * np.abs(x_ND).max() + 1e-30)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 3))
def test_centroids_are_the_same_bits_for_any_order(seed, k, restarts):
    x_ND = blobs(seed=seed % 1000)
    one, other = (
        fit_kmeans(vectors, x_ND[:200], k, restarts=restarts, iterations=20, seed=1)
        for vectors in (x_ND, np.random.default_rng(seed).permutation(x_ND))
    )
    np.testing.assert_array_equal(one.centroids_KD, other.centroids_KD)
    assert one.inertias == other.inertias


def test_float32_sums_would_not_have_passed_that():
    x_ND = blobs()
    assert (x_ND.sum(axis=0, dtype=np.float32) != x_ND[::-1].copy().cumsum(axis=0, dtype=np.float32)[-1]).any()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 7))
def test_statistics_are_those_of_the_float64_labels(seed, k):
    x_ND = blobs(seed=seed % 1000)
    grid = grid_of(x_ND)
    snapped_ND = grid.snap(x_ND)
    centroids_RKD = np.random.default_rng(seed).normal(size=(2, k, x_ND.shape[1]))
    statistics = step_of(snapped_ND, centroids_RKD, grid)
    for r in range(2):
        d_NK = squared_distances(snapped_ND, centroids_RKD[r])
        labels_N = d_NK.argmin(axis=1)
        np.testing.assert_array_equal(statistics.counts_RK[r], np.bincount(labels_N, minlength=k))
        sums_KD = np.stack([(snapped_ND[labels_N == j] / grid.step).astype(np.int64).sum(axis=0) for j in range(k)])
        np.testing.assert_array_equal(statistics.sums_RKD[r], sums_KD)
        assert statistics.inertias(centroids_RKD, grid)[r] == pytest.approx(d_NK.min(axis=1).sum(), rel=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 8), st.booleans())
def test_memory_of_earlier_steps_changes_nothing_and_inertia_never_rises(seed, k, structured):
    x_ND = blobs(seed=seed, spread=2.0 if structured else 0.0)
    grid = grid_of(x_ND)
    snapped_ND = grid.snap(x_ND)
    block = Block(snapped_ND, grid)
    centroids_RKD = np.stack([seed_centroids(snapped_ND, k, np.random.default_rng(seed + r)) for r in range(2)])
    last_R = np.full(2, np.inf)
    for _ in range(12):
        remembered = block.step(centroids_RKD, [0, 1])
        fresh = step_of(snapped_ND, centroids_RKD, grid)
        np.testing.assert_array_equal(remembered.sums_RKD, fresh.sums_RKD)
        np.testing.assert_array_equal(remembered.counts_RK, fresh.counts_RK)
        for r in range(2):
            labels_N = squared_distances(snapped_ND, centroids_RKD[r]).argmin(axis=1)
            np.testing.assert_array_equal(block.labels(r), labels_N)
        inertia_R = remembered.inertias(centroids_RKD, grid)
        assert (inertia_R <= last_R * (1 + 1e-12)).all()
        last_R = inertia_R
        centroids_RKD = update(remembered, centroids_RKD, grid, snapped_ND)


def test_ties_go_to_the_first_cluster():
    x_ND = np.repeat(np.eye(4, dtype=np.float32), 50, axis=0)
    grid = Grid.covering(np.zeros(4, np.float32), 1.0, len(x_ND))
    centroids_KD = np.stack([np.zeros(4), np.zeros(4), np.ones(4)])  # all as far from every vector as their twin
    assert step_of(x_ND, centroids_KD[None], grid).counts_RK.tolist() == [[200, 0, 0]]


@pytest.mark.parametrize(("n", "d", "k"), [(800, 16, 6), (500, 3, 4), (700, 130, 8)])
def test_same_centroids_and_labels_as_scikit_learn_from_the_same_start(n, d, k):
    x_ND = blobs(n, d, k, seed=n)
    start_KD = x_ND[np.random.default_rng(1).choice(n, k, replace=False)]
    ours = fit_kmeans(x_ND, x_ND, k, iterations=300, tolerance=0.0, initial_RKD=start_KD[None].astype(np.float64))
    theirs = KMeans(k, init=start_KD, n_init=1, max_iter=300, tol=0.0).fit(x_ND)
    np.testing.assert_allclose(ours.centroids_KD, theirs.cluster_centers_, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(squared_distances(x_ND, ours.centroids_KD).argmin(axis=1), theirs.labels_)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-4)


def test_seeding_is_as_good_as_scikit_learns():
    x_ND = blobs(2000, 16, 10, spread=3.0)
    ours = fit_kmeans(x_ND, x_ND, 10, restarts=4, iterations=100)
    theirs = KMeans(10, n_init=4, random_state=0).fit(x_ND)
    assert ours.inertia <= theirs.inertia_ * 1.01
    assert len(ours.inertias) == 4
    assert ours.inertia == min(ours.inertias)


def test_an_empty_cluster_moves_to_the_farthest_sample_point():
    x_ND = np.array([[0, 0], [0.125, 0], [8, 0], [8.125, 0], [-64, 0]], np.float32)
    grid = Grid.covering(np.zeros(2, np.float32), 64.0, 5)
    centroids_RKD = np.array([[[0.0, 0], [8, 0], [1000, 1000]]])
    moved_RKD = update(step_of(x_ND, centroids_RKD, grid), centroids_RKD, grid, x_ND)
    np.testing.assert_array_equal(moved_RKD[0, 2], [-64, 0])


def test_identical_documents_still_end():
    x_ND = np.ones((50, 3), np.float32)
    fit = fit_kmeans(x_ND, x_ND, 4, iterations=10)
    assert fit.inertia == 0
    np.testing.assert_array_equal(fit.centroids_KD, np.ones((4, 3)))


def test_more_clusters_than_sample_vectors_is_an_error():
    with pytest.raises(ValueError, match="cannot seed 4"):
        fit_kmeans(np.ones((3, 2), np.float32), np.ones((3, 2), np.float32), 4)
