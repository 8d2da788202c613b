"""Records of text that a model was not trained on: the corpus room reads the text, and the evaluation measures the model on it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Sample = tuple[bytes, str, str, Tokens]
"""A document: id, source, text and tokens."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file that is not read, because of `on_error: skip` or because its folder also holds tables."""

    path: str
    reason: str


class Unseen(NamedTuple):
    """A sample of text that a model was not trained on.

    Attributes:
        samples: Id, source, text and tokens of each document, source by source.
        trained_on: Number of documents left out because they were trained on.
        skipped: Files that were not read.
    """

    samples: list[Sample]
    trained_on: int
    skipped: list[Skipped]
