"""The fitted cluster model, which assigns new documents to clusters.

Shapes: N documents, D dimensions, E clusters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from moedisco_ray.stages.clustering.distances import Array, cluster_costs
from moedisco_ray.stages.clustering.vectors import Vectoriser, load_vectoriser


@dataclasses.dataclass(frozen=True)
class ClusterModel:
    """A vectoriser, and a price and a centroid for each cluster.

    There are no centroids if the vectors are already costs.

    Attributes:
        centroids_ED: Centroids, float64; None if the vectors are costs.
        prices_E: Prices of the balanced assignment of the training documents, float64; zeros without a capacity.
    """

    vectoriser: Vectoriser
    centroids_ED: Array | None
    prices_E: Array

    def costs(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:
        """Cost of each document in each cluster, float64 [N, E]; see `distances.cluster_costs`.

        Args:
            texts: Texts of N documents.
            tokens: Token ids of the same documents, from the run's tokenizer.
        """
        return cluster_costs(self.vectoriser.transform(texts, tokens), self.centroids_ED)

    def assign(self, texts: Sequence[str], tokens: Sequence[Array], *, balanced: bool = False) -> Array:
        """Assign each document to a cluster, int64 [N].

        By default a document goes to the cluster of least cost: training is balanced, inference is not (c-BTM, arXiv
        2303.14177).

        Args:
            texts: Texts of N documents.
            tokens: Token ids of the same documents.
            balanced: Whether to add each cluster's balancing price to its costs, as in training.
        """
        cost_NE = self.costs(texts, tokens)
        return (cost_NE + self.prices_E if balanced else cost_NE).argmin(axis=1)

    def save(self, directory: Path) -> None:
        """Write the model into a directory, which is made when absent."""
        directory.mkdir(parents=True, exist_ok=True)
        self.vectoriser.save(directory)
        centroids_ED = np.empty((0, 0)) if self.centroids_ED is None else self.centroids_ED
        np.savez(directory / "clusters.npz", centroids=centroids_ED, prices=self.prices_E)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """Load a saved model; its vectoriser runs on `device`."""
        with np.load(directory / "clusters.npz", allow_pickle=False) as arrays:
            centroids_ED = arrays["centroids"] if len(arrays["centroids"]) else None
            return cls(load_vectoriser(directory, device), centroids_ED, arrays["prices"])
