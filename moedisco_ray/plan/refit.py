"""Settings for a training whose card has less memory than was planned with: measured before it begins, or run out of.

Only settings with which the training can continue are changed: a smaller micro-batch, and recomputation if the
configuration leaves it open. Before the first checkpoint, which stores the optimizer's state, AdamW's moments may also
be stored in 8 bits or in the machine's memory, as far as that is open. The precision of the weights and the training of
blocks stay as they are: other sub-models of the run have the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moedisco_ray.core.config import Optimizer
from moedisco_ray.plan.fitting import by_cost, combinations
from moedisco_ray.plan.memory import GIB, Memory

SHARE = 0.93
"""Part of a card, and of the planned memory that it did not have, with which a training is planned again after it ran
out of memory: allocators and libraries take more than the plan assumes."""


def within(
    measure: Callable[[Optimizer], Memory],
    optimizer: Optimizer,
    most_gb: float,
    *,
    sequence_length: int,
    workers: int,
    alone: bool,
    has_state: bool,
) -> Optimizer | None:
    """The settings that cost least time and need at most some memory; None if none do.

    Args:
        measure: Memory of a worker.
        optimizer: The settings so far; null and `auto` are open.
        most_gb: The memory (GiB).
        sequence_length: Tokens per sequence.
        workers: Number of workers that share the batch.
        alone: Whether all weights are trained by one worker, which offloaded moments need.
        has_state: Whether a checkpoint may have the optimizer's state.
    """
    pinned: dict[str, Any] = {
        "precision": optimizer.arithmetic(bf16=True) if optimizer.precision == "auto" else optimizer.precision,
        "block_steps": optimizer.block_steps or 0,
    }
    if has_state:
        pinned["moments"] = "fp8" if optimizer.moments == "fp8" else "full"
        pinned["offload_moments"] = bool(optimizer.offload_moments)
    trials = combinations(optimizer.model_copy(update=pinned), sequence_length, workers, alone=alone)
    for _, trial in by_cost(measure, trials, step_seconds=1.0):
        if measure(trial).total <= most_gb * GIB:
            return trial.model_copy(update={name: getattr(optimizer, name) for name in pinned})
    return None
