"""The fitted cluster model: says of a new document which cluster it belongs to, without Ray.

Shapes: N documents, D dimensions, E clusters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from moedisco_ray.stages.clustering.blocks import cluster_costs
from moedisco_ray.stages.clustering.grid import Array
from moedisco_ray.stages.clustering.vectors import Vectoriser, load_vectoriser


@dataclasses.dataclass(frozen=True)
class ClusterModel:
    """A vectoriser, and one price per cluster, with a centroid each where its vectors are not costs already.

    Attributes:
        vectoriser: Makes vectors of documents.
        centroids_ED: float64, or None.
        prices_E: float64, of the balanced assignment of the training documents; zeros without a capacity.
    """

    vectoriser: Vectoriser
    centroids_ED: Array | None
    prices_E: Array

    def costs(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:
        """What each document costs in each cluster, float64 [N, E]; see `blocks.cluster_costs`.

        Args:
            texts: N texts.
            tokens: The same documents as token ids of the run's tokeniser.
        """
        return cluster_costs(self.vectoriser.transform(texts, tokens), self.centroids_ED)

    def assign(self, texts: Sequence[str], tokens: Sequence[Array], *, balanced: bool = False) -> Array:
        """The cluster of each document, int64 [N].

        By default the least cost: training is balanced, inference is not (c-BTM, arXiv 2303.14177).

        Args:
            texts: N texts.
            tokens: The same documents as token ids.
            balanced: Add the prices, as training did.
        """
        cost_NE = self.costs(texts, tokens)
        return (cost_NE + self.prices_E if balanced else cost_NE).argmin(axis=1)

    def save(self, directory: Path) -> None:
        """Write everything into a directory, which is made."""
        directory.mkdir(parents=True, exist_ok=True)
        self.vectoriser.save(directory)
        centroids_ED = np.empty((0, 0)) if self.centroids_ED is None else self.centroids_ED
        np.savez(directory / "clusters.npz", centroids=centroids_ED, prices=self.prices_E)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """Read what `save` wrote."""
        with np.load(directory / "clusters.npz", allow_pickle=False) as arrays:
            centroids_ED = arrays["centroids"] if len(arrays["centroids"]) else None
            return cls(load_vectoriser(directory, device), centroids_ED, arrays["prices"])
