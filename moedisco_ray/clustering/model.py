"""The fitted cluster model: says of a new document which cluster it belongs to, without Ray.

Shapes: N documents, D dimensions, E clusters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from moedisco_ray.clustering.blocks import squared_distances
from moedisco_ray.clustering.grid import Array
from moedisco_ray.clustering.vectors import Vectoriser, load_vectoriser


@dataclasses.dataclass(frozen=True)
class ClusterModel:
    """A vectoriser, and one centroid and price per cluster.

    Attributes:
        vectoriser: Makes vectors of documents.
        centroids_ED: float64.
        prices_E: float64, of the balanced assignment of the training documents; zeros without a capacity.
    """

    vectoriser: Vectoriser
    centroids_ED: Array
    prices_E: Array

    def distances(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:
        """Squared distances to the centroids, float64 [N, E].

        Args:
            texts: N texts.
            tokens: The same documents as token ids of the run's tokeniser.
        """
        return squared_distances(self.vectoriser.transform(texts, tokens), self.centroids_ED)

    def assign(self, texts: Sequence[str], tokens: Sequence[Array], *, balanced: bool = False) -> Array:
        """The cluster of each document, int64 [N].

        By default the nearest centroid: training is balanced, inference is not (c-BTM, arXiv 2303.14177).

        Args:
            texts: N texts.
            tokens: The same documents as token ids.
            balanced: Add the prices, as training did.
        """
        d_NE = self.distances(texts, tokens)
        return (d_NE + self.prices_E if balanced else d_NE).argmin(axis=1)

    def save(self, directory: Path) -> None:
        """Write everything into a directory, which is made."""
        directory.mkdir(parents=True, exist_ok=True)
        self.vectoriser.save(directory)
        np.savez(directory / "clusters.npz", centroids=self.centroids_ED, prices=self.prices_E)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """Read what `save` wrote."""
        with np.load(directory / "clusters.npz", allow_pickle=False) as arrays:
            return cls(load_vectoriser(directory, device), arrays["centroids"], arrays["prices"])
