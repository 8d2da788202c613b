"""Lloyd steps (k-means) on a block of vectors: a label for each vector, and exact sums and counts per cluster.

A label is always the argmin over k of `squared_distances`, a float64 formula of one row and one centroid; ties take the
smallest k. Three measures make it fast:

* **Screen in float32.** Scores s_k = |c_k|^2 / 2 - x.c_k come from a matrix product in float32. Its error is bounded by
  e = (D + 8) 2^-24 (|x| |c| + |c|^2) for any order of summation (Higham, Accuracy and Stability of Numerical
  Algorithms, 3.1). If the two smallest scores are more than 2e apart, the argmin is certain. The few other rows are
  computed in float64.
* **Skip labels that cannot change.** After a row is labelled, `gap` is a lower bound of (distance to the second
  nearest centroid - distance to the nearest). When centroids move, the gap shrinks by at most the nearest one's move
  plus the largest move of the others (the triangle inequality; Hamerly 2010, with both bounds combined into one). The
  label is valid as long as the gap is positive.
* **Add only changes.** Sums are exact, so moving a row from one cluster to another gives the same sums as adding up all
  rows again.

A block remembers labels and gaps only to save work: a new block of the same vectors gives the same results.

Shapes: N documents, M documents of a chunk, D dimensions, K clusters, R restarts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from moedisco_ray.stages.clustering.grid import Array, Grid

_CHUNK_BYTES = 1 << 20
_UNIT_ROUNDOFF = 2.0**-24
_DENSE = 0.75
"""Share of rows that need a new label above which all rows are labelled, because selecting rows would cost more."""

_Change = tuple[Array, Array, Array]
"""Indices of the rows that changed their cluster, the clusters that they joined, and the clusters that they left."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of a block of vectors for one Lloyd step.

    Attributes:
        sums_RKD: Sum of each cluster's vectors in units of `Grid.step`, int64.
        counts_RK: Number of each cluster's vectors, int64.
        squares: Sum of squared norms in units of `Grid.square_step`.
    """

    sums_RKD: Array
    counts_RK: Array
    squares: int

    def inertias(self, centroids_RKD: Array, grid: Grid) -> Array:
        """Sum of squared distances to the nearest centroid, per restart [R].

        sum |x - c|^2 = sum |x|^2 - 2 sum_k c_k . S_k + sum_k n_k |c_k|^2, with S_k and n_k the sum and size of
        cluster k.
        """
        cross_R = (centroids_RKD * (self.sums_RKD * grid.step)).sum(axis=(1, 2))
        norms_R = (self.counts_RK * np.square(centroids_RKD).sum(axis=2)).sum(axis=1)
        return np.maximum(self.squares * grid.square_step - 2 * cross_R + norms_R, 0.0)


def squared_distances(x_ND: Array, centroids_KD: Array) -> Array:
    """Squared Euclidean distances, float64 [N, K]. A row's values depend only on that row, to the last bit.

    A matrix product does not have this property: BLAS sums in an order that depends on the number of rows.
    """
    out_NK = np.empty((len(x_ND), len(centroids_KD)))
    rows = max(1, _CHUNK_BYTES // (8 * centroids_KD.size))
    for start in range(0, len(x_ND), rows):
        difference_MKD = x_ND[start : start + rows, None, :].astype(np.float64) - centroids_KD
        # Along contiguous memory, numpy's order of summation depends only on the length.
        out_NK[start : start + rows] = np.add.reduce(difference_MKD * difference_MKD, axis=2)
    return out_NK


def cluster_costs(x_ND: Array, centroids_KD: Array | None) -> Array:
    """Cost of each document in each cluster, float64 [N, K]: squared distances; without centroids, the vectors themselves."""
    return x_ND.astype(np.float64) if centroids_KD is None else squared_distances(x_ND, centroids_KD)


@dataclasses.dataclass
class _Memory:
    """What a block remembers of one k-means restart after the latest Lloyd step."""

    centroids_KD: Array
    labels_N: Array
    gaps_N: Array
    sums_KD: Array
    counts_K: Array


class Block:
    """Vectors of some documents, with each vector's label and gap, which are remembered between Lloyd steps.

    The gap is how much farther the second nearest centroid is than the nearest.

    Args:
        x_ND: Vectors snapped to the grid, float32.
        grid: Grid of the vectors.
    """

    def __init__(self, x_ND: Array, grid: Grid) -> None:
        self._x_ND = np.ascontiguousarray(x_ND, dtype=np.float32)
        self._grid = grid
        self._rows = max(256, _CHUNK_BYTES // (4 * max(x_ND.shape[1], 1)))
        self._squares_N = np.empty(len(x_ND))
        for start in range(0, len(x_ND), self._rows):
            wide_MD = self._x_ND[start : start + self._rows].astype(np.float64)
            self._squares_N[start : start + self._rows] = np.add.reduce(wide_MD * wide_MD, axis=1)
        self._squares = int(np.rint(self._squares_N / grid.square_step).astype(np.int64).sum())
        self._memories: dict[int, _Memory] = {}

    def step(self, centroids_RKD: Array, running: Sequence[int]) -> Statistics:
        """Label every vector for each restart and return the statistics.

        Args:
            centroids_RKD: Centroids of R restarts relative to the grid's origin, float64.
            running: Numbers of these R restarts, which identify them from step to step.
        """
        drifts_RK = [self._drift(r, centroids_KD) for r, centroids_KD in zip(running, centroids_RKD, strict=True)]
        self._memories = {r: self._memories[r] for r in running}
        memories = [self._memories[r] for r in running]
        screens = [_Screen.of(centroids_KD) for centroids_KD in centroids_RKD]
        changes: list[list[_Change]] = [[] for _ in running]
        for start in range(0, len(self._x_ND), self._rows):
            rows = slice(start, start + self._rows)
            for memory, drift_K, screen, found in zip(memories, drifts_RK, screens, changes, strict=True):
                found.extend(self._label(memory, rows, drift_K, screen))
        for memory, found in zip(memories, changes, strict=True):
            self._carry_over(memory, found)
        sums_RKD = np.stack([memory.sums_KD for memory in memories])
        counts_RK = np.stack([memory.counts_K for memory in memories])
        return Statistics(self._grid.integers(sums_RKD), counts_RK, self._squares)

    def labels(self, restart: int) -> Array:
        """The nearest centroid of every vector as of the last step, int64 [N]."""
        return self._memories[restart].labels_N.astype(np.int64)

    def _drift(self, restart: int, centroids_KD: Array) -> Array:
        """Upper bound [K] on how much the gaps of each cluster's rows shrank in this step; creates a new restart's `_Memory`."""
        memory = self._memories.get(restart)
        K, D = centroids_KD.shape
        if memory is None:
            labels_N = np.zeros(len(self._x_ND), np.int32)
            gaps_N = np.full(len(self._x_ND), -np.inf)
            self._memories[restart] = _Memory(centroids_KD, labels_N, gaps_N, np.zeros((K, D)), np.zeros(K, np.int64))
            # All rows start in cluster 0, so that the first step is an ordinary change of labels.
            self._memories[restart].sums_KD[0] = self._total()
            self._memories[restart].counts_K[0] = len(self._x_ND)
            return np.zeros(K)
        moves_K = np.sqrt(np.square(centroids_KD - memory.centroids_KD).sum(axis=1)) * (1 + 1e-9)
        memory.centroids_KD = centroids_KD
        if K == 1:
            return moves_K
        order = np.argsort(moves_K)
        largest_other_K = np.full(K, moves_K[order[-1]])
        largest_other_K[order[-1]] = moves_K[order[-2]]
        return moves_K + largest_other_K

    def _total(self) -> Array:
        total_D = np.zeros(self._x_ND.shape[1])
        for start in range(0, len(self._x_ND), self._rows):
            total_D += self._x_ND[start : start + self._rows].sum(axis=0, dtype=np.float64)
        return total_D

    def _label(self, memory: _Memory, rows: slice, drift_K: Array, screen: _Screen) -> list[_Change]:
        """Label one chunk for one restart; return the rows that changed their cluster."""
        labels_M, gaps_M = memory.labels_N[rows], memory.gaps_N[rows]
        gaps_M -= drift_K[labels_M]
        open_M = np.flatnonzero(gaps_M <= screen.certain)
        if not len(open_M):
            return []
        x_MD, squares_M = self._x_ND[rows], self._squares_N[rows]
        if len(open_M) > _DENSE * len(labels_M):
            open_M = np.arange(len(labels_M))
        else:
            x_MD, squares_M = np.take(x_MD, open_M, axis=0), squares_M[open_M]
        new_M, gaps_M[open_M] = screen.nearest(x_MD, squares_M)
        changed = np.flatnonzero(new_M != labels_M[open_M])
        if not len(changed):
            return []
        at, gained = open_M[changed], new_M[changed]
        lost = labels_M[at]
        labels_M[at] = gained
        return [(at + rows.start, gained, lost)]

    def _carry_over(self, memory: _Memory, changes: list[_Change]) -> None:
        """Subtract changed rows from the sums of their old clusters and add them to the new ones; exact on a grid."""
        if not changes:
            return
        at, gained, lost = (np.concatenate(parts) for parts in zip(*changes, strict=True))
        K = len(memory.counts_K)
        memory.counts_K += np.bincount(gained, minlength=K) - np.bincount(lost, minlength=K)
        for start in range(0, len(at), _CHUNK_BYTES // 64):
            part = slice(start, start + _CHUNK_BYTES // 64)
            x_MD = np.take(self._x_ND, at[part], axis=0).astype(np.float64)
            # Column m of this matrix has +1 for the cluster that gained row m and -1 for the one that lost it.
            clusters = np.stack([gained[part], lost[part]], axis=1).ravel()
            ends = np.arange(0, len(clusters) + 1, 2)
            signs_KM = sparse.csc_matrix((_signs(len(clusters)), clusters, ends), shape=(K, len(x_MD)))
            memory.sums_KD += signs_KM @ x_MD


def _signs(n: int) -> Array:
    signs = np.ones(n)
    signs[1::2] = -1
    return signs


@dataclasses.dataclass(frozen=True)
class _Screen:
    """Centroids prepared for a fast search of the nearest centroid in float32, which leaves uncertain cases to float64.

    Attributes:
        centroids_KD: Centroids, float64.
        narrow_KD: Negated centroids, float32.
        halves_K: |c_k|^2 / 2, float32.
        largest: max_k |c_k|.
        certain: Minimum gap between the distances to the two nearest centroids for which rounding in float64 cannot
            change the label.
    """

    centroids_KD: Array
    narrow_KD: Array
    halves_K: Array
    largest: float
    certain: float

    @classmethod
    def of(cls, centroids_KD: Array) -> _Screen:
        norms_K = np.square(centroids_KD).sum(axis=1)
        largest = float(np.sqrt(norms_K.max()))
        narrow_KD, halves_K = -centroids_KD.astype(np.float32), (norms_K / 2).astype(np.float32)
        return cls(centroids_KD, narrow_KD, halves_K, largest, 1e-9 * largest)

    def nearest(self, x_MD: Array, squares_M: Array) -> tuple[Array, Array]:
        """Nearest centroid of each vector [M], and a lower bound [M] of how much farther the second nearest centroid is."""
        K, D = self.narrow_KD.shape
        # BLAS is twice as fast on this product as on its transpose; the loop below needs a cluster's scores contiguous.
        scores_KM = np.ascontiguousarray((x_MD @ self.narrow_KD.T).T)
        best_M = scores_KM[0]
        best_M += self.halves_K[0]
        second_M = np.full(len(x_MD), np.inf, dtype=np.float32)
        labels_M = np.zeros(len(x_MD), dtype=np.int32)
        larger_M, below_M = np.empty_like(second_M), np.empty(len(x_MD), dtype=bool)
        for k in range(1, K):
            score_M = scores_KM[k]
            score_M += self.halves_K[k]
            np.less(score_M, best_M, out=below_M)
            np.maximum(score_M, best_M, out=larger_M)
            np.minimum(second_M, larger_M, out=second_M)
            np.minimum(best_M, score_M, out=best_M)
            np.putmask(labels_M, below_M, k)
        error_M = (D + 8) * _UNIT_ROUNDOFF * (np.sqrt(squares_M) * self.largest + self.largest**2)
        best_M, second_M = best_M.astype(np.float64), second_M.astype(np.float64)
        near_M = np.maximum(squares_M + 2 * (best_M + error_M), 0.0)
        far_M = np.maximum(squares_M + 2 * (second_M - error_M), 0.0)
        gaps_M = np.sqrt(far_M) - np.sqrt(near_M)
        unsure = np.flatnonzero(gaps_M <= self.certain) if K > 1 else np.empty(0, np.int64)
        if len(unsure):
            exact_MK = squared_distances(x_MD[unsure], self.centroids_KD)
            labels_M[unsure] = exact_MK.argmin(axis=1)
            two_M2 = np.sqrt(np.partition(exact_MK, 1, axis=1)[:, :2])
            gaps_M[unsure] = two_M2[:, 1] - two_M2[:, 0] - self.certain
        return labels_M, gaps_M
