"""Distances of document vectors to centroids. A row's values depend only on that row, to the last bit.

Shapes: N documents, M documents of a chunk, D dimensions, K clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_CHUNK_BYTES = 1 << 20


def squared_distances(x_ND: Array, centroids_KD: Array) -> Array:
    """Squared Euclidean distances, float64 [N, K].

    A matrix product would be faster, but BLAS sums in an order that depends on the number of rows.
    """
    out_NK = np.empty((len(x_ND), len(centroids_KD)))
    rows = max(1, _CHUNK_BYTES // (8 * centroids_KD.size))
    for start in range(0, len(x_ND), rows):
        difference_MKD = x_ND[start : start + rows, None, :].astype(np.float64) - centroids_KD
        # Along contiguous memory, numpy's order of summation depends only on the length.
        out_NK[start : start + rows] = np.add.reduce(difference_MKD * difference_MKD, axis=2)
    return out_NK


def cluster_costs(x_ND: Array, centroids_KD: Array | None) -> Array:
    """Cost of each document in each cluster, float64 [N, K]: squared distances; without centroids, the vectors."""
    return x_ND.astype(np.float64) if centroids_KD is None else squared_distances(x_ND, centroids_KD)
