"""The interface of all kinds of document vectors.

Shapes: N documents, S documents of the sample, D dimensions.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from moedisco_ray.core.config import Clusters
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.stages.clustering.distances import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitInputs:
    """Inputs from which a vectoriser is fitted; each kind uses the ones it needs.

    Attributes:
        texts: Texts of sampled documents, in ascending order of id.
        tokens: Token ids of the same documents.
        model_dir: Directory of the seed model.
        max_tokens: Maximum number of tokens that a vectoriser reads from a document's beginning: those of one training
            sequence.
        settings: The `clusters` section of the configuration.
        seed: Seed of the run.
    """

    texts: Sequence[str]
    tokens: Sequence[Array]
    model_dir: Path
    max_tokens: int
    settings: Clusters
    seed: int


class Vectoriser(abc.ABC):
    """Turns documents into vectors.

    A vector is `adjust(embed(document), centre_D)`. `embed` is expensive and runs once per document, on any number of
    workers. The centre, which only some kinds have, is computed from the embedded sample.
    """

    kind: ClassVar[str]
    centre_D: Array | None = None

    @classmethod
    @abc.abstractmethod
    def fit(cls, inputs: FitInputs) -> Self:
        """Fit a vectoriser to a corpus; a call of `centre` completes it."""

    @abc.abstractmethod
    def embed(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:
        """Vectors before centring, float32 [N, D].

        Args:
            texts: Texts of N documents.
            tokens: Token ids of the same documents, int32, of any length.
        """

    def centre(self, sample_ND: Array) -> None:  # noqa: B027 - most kinds have no centre
        """Compute the centre from the embedded sample. Kinds of vectors without a centre do nothing."""

    def transform(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:
        """Final vectors of documents, float32 [N, D]."""
        return adjust(self.embed(texts, tokens), self.centre_D)

    @abc.abstractmethod
    def save(self, directory: Path) -> None:
        """Write the vectoriser into an existing directory."""

    @classmethod
    @abc.abstractmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """Load a saved vectoriser; its model, if any, runs on `device`."""


def adjust(x_ND: Array, centre_D: Array | None) -> Array:
    """Subtract the centre and scale vectors to unit length; without a centre, return them unchanged."""
    return x_ND if centre_D is None else unit_length(x_ND - centre_D)


def unit_length(x_ND: Array) -> Array:
    """Scale rows to Euclidean length 1, float32; a zero row stays zero."""
    norms_N1 = np.sqrt(np.add.reduce(np.square(x_ND, dtype=np.float64), axis=1, keepdims=True))
    return (x_ND / np.where(norms_N1 > 0, norms_N1, 1.0)).astype(np.float32)


def write_settings(directory: Path, kind: str, **settings: Any) -> None:
    """Write a vectoriser's kind and settings as JSON."""
    write_json(directory / "vectoriser.json", {"kind": kind, **settings})


def read_settings(directory: Path) -> dict[str, Any]:
    """Read the kind and settings that `write_settings` wrote."""
    settings: dict[str, Any] = read_json(directory / "vectoriser.json")
    return settings
