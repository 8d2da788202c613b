"""Records of text that a model was not trained on: what the corpus stage reads of it, and the evaluation measures."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Sample = tuple[bytes, str, str, Tokens]
"""Id, source, text and tokens of a document."""


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file that is not read: its source says `on_error: skip`, or it was passed over."""

    path: str
    reason: str


class Unseen(NamedTuple):
    """A sample of text that a model was not trained on.

    Attributes:
        samples: Id, source, text and tokens of each document, source by source.
        trained_on: Number of documents left out because they were trained on.
        skipped: Files that could not be read, where the source says `on_error: skip`, and those that were passed over.
    """

    samples: list[Sample]
    trained_on: int
    skipped: list[Skipped]
