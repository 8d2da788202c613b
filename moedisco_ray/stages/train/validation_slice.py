"""The held-out text of a training's loss: the same documents, in the same windows, as in the evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from moedisco_ray.stages.scoring import fill, plan_batches
from moedisco_ray.stages.text.validation import load_documents


@dataclasses.dataclass(frozen=True)
class ValidationSlice:
    """The first validation documents up to `max_tokens`; see `load_documents`.

    Attributes:
        every: Steps between two measurements.
        parts: Parquet files of the validation documents.
        max_tokens: Maximum tokens to measure on.
        prefix: The token before each document.
        sequence_length: Maximum positions of a window.
    """

    every: int
    parts: tuple[Path, ...]
    max_tokens: int
    prefix: int
    sequence_length: int

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the text."""
        return self.parts

    def batches(self, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets [B, L] of B windows of at most L positions; -100 at padding and uncounted tokens."""
        documents = load_documents(self.parts, self.max_tokens)
        tokens = documents.tokens
        lengths_N = np.array([len(document) for document in tokens], dtype=np.int64)
        for windows in plan_batches(lengths_N, self.sequence_length, batch_tokens):
            yield fill(tokens, windows, self.prefix, documents.loss_masks)
