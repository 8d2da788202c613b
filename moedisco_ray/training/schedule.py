from __future__ import annotations

import math

from moedisco_ray.config import Optimizer

_FLOOR = 0.1


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """The learning rate of a step: linear warm-up, then constant, a cosine that ends at a tenth, or a line that ends at zero.

    With w = warmup * steps rounded up: lr (step + 1) / w while step < w; after that, for the cosine with
    t = (step - w) / (steps - 1 - w): lr (0.1 + 0.9 (1 + cos(pi t)) / 2), after Loshchilov and Hutter 2017, SGDR,
    equation 5; for the line lr (steps - step) / (steps - w), after Bergsma et al. 2025, Straight to Zero (arXiv 2502.15938).

    Args:
        step: Counted from 0.
        steps: Of the whole training.
        optimizer: Its `lr`, `schedule` and `warmup`.
    """
    warmup = math.ceil(optimizer.warmup * steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    if optimizer.schedule == "constant":
        return optimizer.lr
    if optimizer.schedule == "linear":
        return optimizer.lr * (steps - step) / (steps - warmup)
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return optimizer.lr * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * progress)) / 2)
