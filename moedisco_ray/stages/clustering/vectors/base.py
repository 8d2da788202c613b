"""What every kind of document vector has in common.

Shapes: N documents, S documents of the sample, D dimensions.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from moedisco_ray.core.artifacts import read_json, write_json
from moedisco_ray.core.config import Clusters
from moedisco_ray.stages.clustering.grid import Array


@dataclasses.dataclass(frozen=True)
class FitInputs:
    """What a vectoriser may be made from; each kind takes what it needs.

    Attributes:
        texts: A sample of the corpus, in ascending order of id.
        tokens: The same documents as token ids.
        weights_S: Their training tokens.
        ids_S: Their ids.
        model_dir: The seed model.
        max_tokens: Tokens of a training sequence.
        settings: The clusters section.
        seed: The run's.
    """

    texts: Sequence[str]
    tokens: Sequence[Array]
    weights_S: Array
    ids_S: Array
    model_dir: Path
    max_tokens: int
    settings: Clusters
    seed: int


class Vectoriser(abc.ABC):
    """Turns documents into vectors.

    A vector is `adjust(embed(document), centre_D)`: `embed` is the expensive part that runs once per document, on any
    number of workers; the centre, where a kind has one, is known only after the sample has been embedded.
    """

    kind: ClassVar[str]
    centre_D: Array | None = None

    @classmethod
    @abc.abstractmethod
    def fit(cls, inputs: FitInputs) -> Self:
        """Make one for a corpus; `centre` completes it."""

    @abc.abstractmethod
    def embed(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:
        """Vectors before centring, float32 [N, D].

        Args:
            texts: N texts.
            tokens: The same documents as token ids, int32, any length.
        """

    def centre(self, sample_ND: Array) -> None:  # noqa: B027 - most kinds have no centre
        """Fit what depends on the embedded sample."""

    def transform(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:
        """Vectors, float32 [N, D]."""
        return adjust(self.embed(texts, tokens), self.centre_D)

    @abc.abstractmethod
    def save(self, directory: Path) -> None:
        """Write everything that is needed to load it again, into an existing directory."""

    @classmethod
    @abc.abstractmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:
        """Read what `save` wrote; a model goes to `device`."""


def adjust(x_ND: Array, centre_D: Array | None) -> Array:
    """Subtract the centre and scale to unit length; without a centre the vectors stay as they are."""
    return x_ND if centre_D is None else unit_length(x_ND - centre_D)


def unit_length(x_ND: Array) -> Array:
    """Rows scaled to Euclidean length 1, float32; a zero row stays zero."""
    norms_N1 = np.sqrt(np.add.reduce(np.square(x_ND, dtype=np.float64), axis=1, keepdims=True))
    return (x_ND / np.where(norms_N1 > 0, norms_N1, 1.0)).astype(np.float32)


def write_settings(directory: Path, kind: str, **settings: Any) -> None:
    """Write the small part of a vectoriser."""
    write_json(directory / "vectoriser.json", {"kind": kind, **settings})


def read_settings(directory: Path) -> dict[str, Any]:
    """The inverse of `write_settings`."""
    settings: dict[str, Any] = read_json(directory / "vectoriser.json")
    return settings
