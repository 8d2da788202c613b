"""K-means by scikit-learn: what the cluster stage adds to it. Shapes: N documents, D dimensions, K clusters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from moedisco_ray.stages.clustering.distances import squared_distances
from moedisco_ray.stages.clustering.kmeans import fit_kmeans


def blobs(n=600, d=12, k=5, seed=0, spread=1.5):
    generator = np.random.default_rng(seed)
    centres = spread * generator.normal(size=(k, d))
    return (centres[generator.integers(k, size=n)] + generator.normal(size=(n, d)) + 3).astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 40))
def test_a_distance_depends_on_its_row_alone_to_the_last_bit(seed, rows, d):
    x_ND = np.random.default_rng(seed).normal(size=(80, d)).astype(np.float32)
    centroids_KD = x_ND[:3].astype(np.float64)
    np.testing.assert_array_equal(
        squared_distances(x_ND, centroids_KD)[:rows], squared_distances(x_ND[:rows], centroids_KD)
    )


def test_the_result_does_not_depend_on_the_number_of_threads():
    x_ND = blobs(3000, 16, 8)
    one = fit_kmeans(x_ND, 8, seed=1)
    with threadpool_limits(2):
        other = fit_kmeans(x_ND, 8, seed=1)
    np.testing.assert_array_equal(one.centroids_KD, other.centroids_KD)
    assert one.inertias == other.inertias


def test_the_best_of_the_restarts_is_kept_and_is_as_good_as_scikit_learns():
    x_ND, begun = blobs(2000, 16, 10, spread=3.0), []
    fit = fit_kmeans(x_ND, 10, on_restart=lambda: begun.append(1))
    assert fit.inertia <= KMeans(10, n_init=4, random_state=0).fit(x_ND).inertia_ * 1.01
    assert fit.inertia == min(fit.inertias)
    assert len(fit.inertias) == len(begun) == 4
    nearest_N = squared_distances(x_ND, fit.centroids_KD).min(axis=1)
    assert fit.inertia == pytest.approx(nearest_N.sum(), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_numbered_by_their_first_documents(seed):
    x_ND = blobs(400, 8, 6, spread=6.0, seed=seed)
    labels_N = squared_distances(x_ND, fit_kmeans(x_ND, 6, seed=seed).centroids_KD).argmin(axis=1)
    _, first = np.unique(labels_N, return_index=True)
    assert first.tolist() == sorted(first)


def test_identical_documents_still_end():
    fit = fit_kmeans(np.ones((50, 3), np.float32), 4)
    assert fit.inertia == 0
    np.testing.assert_array_equal(fit.centroids_KD, np.ones((4, 3)))
