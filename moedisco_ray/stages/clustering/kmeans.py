"""K-means by Lloyd's algorithm, for several restarts at once.

The result depends only on the set of vectors: it is bit-identical for any order of them. Two properties ensure that:

* vectors are on a `Grid`, so that sums are exact;
* a label is argmin_k of squared distances in float64, each computed from its own row only (`blocks.squared_distances`).

Seeding is greedy k-means++ (Arthur and Vassilvitskii 2007, with the best of 2 + log K trials per centroid, as in
scikit-learn). Lloyd steps on the sample refine the seeds (Bradley and Fayyad 1998), so that fewer steps on all vectors
are needed.

Shapes: N documents, S documents of the sample, D dimensions, K clusters, R restarts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from moedisco_ray.stages.clustering.blocks import Block, Statistics, squared_distances
from moedisco_ray.stages.clustering.grid import Array, Grid, peak

ITERATIONS = 50
"""Maximum number of Lloyd steps per restart; nearly all restarts converge earlier."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """Result of k-means: the best restart.

    Attributes:
        centroids_KD: Centroids in the coordinates of the original vectors, float64.
        inertia: Sum of squared distances to the nearest centroid.
        iterations: Lloyd steps of the best restart.
        steps: Largest number of Lloyd steps of any restart.
        inertias: Inertia of every restart.
    """

    centroids_KD: Array
    inertia: float
    iterations: int
    steps: int
    inertias: tuple[float, ...]


_SEEDINGS = 3
"""Number of choices of initial centroids that each restart tries on the sample, to use the best one. A step on the
sample costs little."""


def seed_centroids(sample_SD: Array, k: int, generator: np.random.Generator) -> Array:
    """Choose k points of the sample by greedy k-means++.

    Each new centroid is the one of 2 + log k candidates that leaves the smallest inertia. Candidates are drawn with
    probability proportional to the squared distance to the nearest centroid so far.

    Args:
        sample_SD: Sample vectors, float32, at least k rows.
        k: Number of clusters.
        generator: Random generator.

    Returns:
        float64 [k, D].
    """
    trials = 2 + int(np.log(k))
    norms_S = np.einsum("sd,sd->s", sample_SD, sample_SD, dtype=np.float64)
    chosen = [int(generator.integers(len(sample_SD)))]

    def distances(rows: Array) -> Array:
        cross_CS = (sample_SD[rows] @ sample_SD.T).astype(np.float64)
        return np.maximum(norms_S - 2 * cross_CS + norms_S[rows, None], 0.0)

    nearest_S = distances(np.array(chosen))[0]
    for _ in range(1, k):
        cumulative_S = np.cumsum(nearest_S)
        draws = np.searchsorted(cumulative_S, generator.random(trials) * cumulative_S[-1], side="right")
        candidates = np.minimum(draws, len(sample_SD) - 1)
        left_CS = np.minimum(nearest_S, distances(candidates))
        best = int(left_CS.sum(axis=1).argmin())
        chosen.append(int(candidates[best]))
        nearest_S = left_CS[best]
    return sample_SD[chosen].astype(np.float64)


def update(statistics: Statistics, centroids_RKD: Array, grid: Grid, sample_SD: Array) -> Array:
    """Compute the next centroids: cluster means.

    An empty cluster moves to the sample point farthest from all centroids.

    Args:
        statistics: Statistics of all vectors for the current centroids.
        centroids_RKD: Current centroids, float64.
        grid: Grid of the vectors.
        sample_SD: Sample vectors, snapped to the grid.

    Returns:
        float64 [R, K, D].
    """
    counts_RK = statistics.counts_RK
    means_RKD = statistics.sums_RKD * grid.step / np.maximum(counts_RK, 1)[..., None]
    for r in np.flatnonzero((counts_RK == 0).any(axis=1)):
        empty = np.flatnonzero(counts_RK[r] == 0)
        nearest_S = squared_distances(sample_SD, centroids_RKD[r]).min(axis=1)
        farthest = np.argsort(-nearest_S, kind="stable")[: len(empty)]
        means_RKD[r, empty[: len(farthest)]] = sample_SD[farthest]
    return means_RKD


def fit_kmeans(
    x_ND: Array,
    sample_SD: Array,
    k: int,
    *,
    restarts: int = 4,
    iterations: int = ITERATIONS,
    seed: int = 0,
    tolerance: float = 1e-4,
    initial_RKD: Array | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Fit:
    """Cluster vectors by k-means.

    A restart ends when its centroids move by no more than `tolerance` times the mean variance (scikit-learn's rule),
    or after `iterations` steps. The other restarts continue.

    Args:
        x_ND: Vectors.
        sample_SD: Sample of the vectors, in an order that depends only on the documents.
        k: Number of clusters.
        restarts: Number of restarts on all vectors. Three times as many seedings are tried on the sample, and the best
            are used.
        iterations: Maximum Lloyd steps per restart.
        seed: Random seed of the seeding.
        tolerance: Convergence threshold; with 0 a restart runs until no centroid moves.
        initial_RKD: Initial centroids, used instead of seeding.
        on_step: Called before each step on all vectors.

    Raises:
        ValueError: The sample has fewer than k rows.
    """
    if len(sample_SD) < k:
        raise ValueError(f"{len(sample_SD)} sample vectors cannot seed {k} clusters")
    origin_D = sample_SD.mean(axis=0, dtype=np.float64).astype(np.float32)
    grid = Grid.covering(origin_D, max(peak(x_ND, origin_D), peak(sample_SD, origin_D)), len(x_ND))
    sample_SD = grid.snap(sample_SD)
    still = tolerance * float(sample_SD.astype(np.float64).var(axis=0).mean())
    if initial_RKD is None:
        generators = [np.random.Generator(np.random.Philox(key=[seed, r])) for r in range(_SEEDINGS * restarts)]
        seeds_RKD = np.stack([seed_centroids(sample_SD, k, generator) for generator in generators])
        refined = _lloyd(Block(sample_SD, grid), seeds_RKD, sample_SD, grid, iterations=iterations, still=still)
        start_RKD = refined.centroids_RKD[np.argsort(refined.inertias_R, kind="stable")[:restarts]]
    else:
        start_RKD = np.asarray(initial_RKD, np.float64) - grid.origin_D
    outcome = _lloyd(
        Block(grid.snap(x_ND), grid), start_RKD, sample_SD, grid, iterations=iterations, still=still, on_step=on_step
    )
    best = int(outcome.inertias_R.argmin())
    return Fit(
        outcome.centroids_RKD[best] + grid.origin_D,
        float(outcome.inertias_R[best]),
        int(outcome.steps_R[best]),
        int(outcome.steps_R.max()),
        tuple(map(float, outcome.inertias_R)),
    )


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """Last state of each restart: centroids relative to the grid's origin, their inertia, steps taken."""

    centroids_RKD: Array
    inertias_R: Array
    steps_R: Array


def _lloyd(
    block: Block,
    centroids_RKD: Array,
    sample_SD: Array,
    grid: Grid,
    *,
    iterations: int,
    still: float,
    on_step: Callable[[], None] = lambda: None,
) -> _Outcome:
    running = list(range(len(centroids_RKD)))
    outcome = _Outcome(centroids_RKD.copy(), np.full(len(running), np.inf), np.zeros(len(running), np.int64))
    for number in range(1, iterations + 1):
        on_step()
        statistics = block.step(centroids_RKD, running)
        moved_RKD = update(statistics, centroids_RKD, grid, sample_SD)
        outcome.centroids_RKD[running], outcome.steps_R[running] = centroids_RKD, number
        outcome.inertias_R[running] = statistics.inertias(centroids_RKD, grid)
        going_R = np.square(moved_RKD - centroids_RKD).sum(axis=(1, 2)) > still
        centroids_RKD = moved_RKD[going_R]
        running = [r for r, going in zip(running, going_R, strict=True) if going]
        if not running:
            break
    return outcome
