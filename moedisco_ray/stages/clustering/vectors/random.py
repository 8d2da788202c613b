"""Random costs from a hash of the document, for the paper's ablation with random clusters.

Shapes: N documents, E clusters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from moedisco_ray.stages.clustering.distances import Array
from moedisco_ray.stages.clustering.vectors.base import FitInputs, Vectoriser, read_settings, write_settings

_WORD = 4
"""Bytes of a document's hash that make its cost in one cluster."""


class RandomCosts(Vectoriser):
    """Random costs of a document in each cluster, uniform in [0, 1), computed from the document's text and the seed.

    Args:
        clusters: Number of clusters, E.
        seed: Seed of the hash.
    """

    kind = "random"

    def __init__(self, clusters: int, seed: int) -> None:
        self._clusters, self._seed = clusters, seed

    @classmethod
    def fit(cls, inputs: FitInputs) -> Self:
        """Take the number of clusters and the seed; nothing is learnt."""
        return cls(inputs.settings.number, inputs.seed)

    def embed(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:  # noqa: ARG002 - one signature for all
        """Costs of documents in each cluster, float32 [N, E]."""
        key = self._seed.to_bytes(8, "big")
        hashed = b"".join(hashlib.shake_256(key + text.encode()).digest(_WORD * self._clusters) for text in texts)
        words_NE = np.frombuffer(hashed, "<u4").reshape(len(texts), self._clusters)
        return (words_NE / np.float64(2**32)).astype(np.float32)

    def save(self, directory: Path) -> None:
        """Write the number of clusters and the seed."""
        write_settings(directory, self.kind, clusters=self._clusters, seed=self._seed)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:  # noqa: ARG003 - one signature for all kinds
        """Load a saved vectoriser."""
        settings = read_settings(directory)
        return cls(settings["clusters"], settings["seed"])
