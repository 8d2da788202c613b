from __future__ import annotations

import math

from moedisco_ray.core.config import Optimizer

_FLOOR = 0.1
"""Learning rate at the end, as a share of the highest."""
DECAY = 0.2
"""Share of the steps in which `wsd` comes down: the tenth to fifth that its paper finds enough."""


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """The learning rate of a step: linear warm-up, then constant, or down to a tenth on a cosine, at once or only at the end.

    With w = warmup * steps rounded up: lr (step + 1) / w while step < w. The cosine comes down from step s = w on, `wsd` (warm-up,
    stable, decay; Hu et al. 2024, MiniCPM, arXiv 2404.06395) from s = steps - 0.2 steps rounded, if that is later, until
    when it is lr: with t = (step - s) / (steps - 1 - s), lr (0.1 + 0.9 (1 + cos(pi t)) / 2), after Loshchilov and Hutter 2017,
    SGDR, equation 5.

    Args:
        step: Counted from 0.
        steps: Of the whole training.
        optimizer: Its `lr`, `schedule` and `warmup`.
    """
    down = warmup = math.ceil(optimizer.warmup * steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    if optimizer.schedule == "wsd":
        down = max(warmup, steps - math.ceil(DECAY * steps))
    if optimizer.schedule == "constant" or step < down:
        return optimizer.lr
    progress = min(1.0, (step - down) / max(1, steps - 1 - down))
    return optimizer.lr * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * progress)) / 2)
