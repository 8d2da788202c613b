"""Records of text that a model was not trained on: the corpus stage's code reads it, and the evaluate stage measures the model."""

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
    """A file that was not read: it is unreadable and `on_error: skip` is set, or it is plain text in a folder of tables."""

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
