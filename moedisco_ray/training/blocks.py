"""Block coordinate descent: one block of weights trains at a time, as in Luo et al. 2024, "BAdam" (arXiv 2404.02827).

A block is a decoder layer, the embedding, or the head with the last norm. All other weights are frozen: they have
neither gradients nor moments, and the backward pass ends at the block. The block changes every `optimizer.block_steps`
steps, and its moments start at zero. Each cycle trains every block once, in an order that depends on the job's seed.
The block of a step depends on the step alone, so a resumed training is exact.
"""

from __future__ import annotations

import re

from torch import nn

from moedisco_ray.packed_tokens import batch_indices
from moedisco_ray.training.job import TrainJob

_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EMBEDDING = ".embed_tokens."


class Blocks:
    """Divides a model's parameters into blocks that train one at a time.

    Parameters that are frozen at first are in no block.

    Args:
        model: The model.
        job: The training; `optimizer.block_steps` is above 0.
    """

    def __init__(self, model: nn.Module, job: TrainJob) -> None:
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found.setdefault(_block_of(name), []).append(parameter)
        self._blocks = [*found.values()]
        self._steps = job.optimizer.block_steps or 1
        self._seed = job.seed
        self._period: int | None = None

    def __len__(self) -> int:
        return len(self._blocks)

    def select(self, step: int) -> bool:
        """Freeze all weights but those of a step's block.

        Args:
            step: Step, counted from 0.

        Returns:
            Whether the step starts with moments of zero: another block trained before it, or the same one in another
            cycle.
        """
        period = step // self._steps
        if period == self._period:
            return False
        self._period = period
        chosen = int(batch_indices(self._seed, period, 1, len(self._blocks))[0])
        for index, block in enumerate(self._blocks):
            for parameter in block:
                parameter.requires_grad = index == chosen
        return True


def _block_of(name: str) -> str:
    layer = _LAYER.search(name)
    if layer is not None:
        return layer[1]
    return "embedding" if _EMBEDDING in name else "head"
