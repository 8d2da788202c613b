"""Steps of a tiny model on few cores that take as long as those of a large model on a GPU."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Pace:
    """A look at the held-out loss after every step, on one sequence, that waits first.

    Attributes:
        seconds: How long it waits.
    """

    seconds: float
    every: int = 1
    files: tuple[Path, ...] = ()

    def batches(self, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One sequence of inputs and targets, after the wait."""
        time.sleep(self.seconds)
        yield torch.ones(1, batch_tokens, dtype=torch.long), torch.ones(1, batch_tokens, dtype=torch.long)
