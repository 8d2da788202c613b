"""Records of text that a model was not trained on.

The corpus stage's code reads it, and the evaluate stage measures the model on it.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Sample(NamedTuple):
    """A document.

    Attributes:
        id: Id of the document.
        source: Name of its source.
        text: Text of the document.
        tokens: Token ids, without special tokens.
        loss_mask: Whether the loss counts each token; None if it counts all.
    """

    id: bytes
    source: str
    text: str
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_] | None


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A file that was not read: it is unreadable and `on_error: skip` is set, or it is plain text among tables."""

    path: str
    reason: str


class Unseen(NamedTuple):
    """A sample of text that a model was not trained on.

    Attributes:
        samples: The documents, source by source.
        trained_on: Number of documents left out because they were trained on.
        skipped: Files that were not read.
    """

    samples: list[Sample]
    trained_on: int
    skipped: list[Skipped]
