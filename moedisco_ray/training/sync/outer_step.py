"""The outer step of a sync point: SGD with Nesterov momentum on the mean delta of the members.

DiLoCo (arXiv 2311.08105, algorithm 1) with the momentum of torch.optim.SGD. From common weights g, members k with
shares w_k have trained theta_k:

    d = sum_k w_k (g - theta_k),    m' = mu m + d,    g' = g - lr (d + mu m').

m' is rounded to float32, in which g and m are stored, before g' is computed from it as g - lr ((1 + mu) m' - mu m).
Everything is computed in float64, element by element, and rounded once. Members are summed in their order. So the
result has the same bits wherever it is computed, and however the weights are divided.

Shape: N elements of the weights, laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moedisco_ray.core.config import Outer


def outer_step(
    start_N: Tensor, copies: Iterable[Tensor], weights: Sequence[float], momentum_N: Tensor | None, outer: Outer
) -> tuple[Tensor, Tensor]:
    """The common weights g' and the momentum m' after the outer step, in float32.

    Args:
        start_N: Common weights g, in float32. A member in bf16 started from g rounded to bf16.
        copies: Weights theta_k of the members, each taken once, in order.
        weights: Shares w_k; they sum to 1.
        momentum_N: Momentum m; None means 0.
        outer: Settings of the outer step: lr, and mu as `momentum`.
    """
    before_N = torch.zeros_like(start_N, dtype=torch.float64) if momentum_N is None else momentum_N.double()
    sum_N = outer.momentum * before_N
    for weight, copy_N in zip(weights, copies, strict=True):
        sum_N += weight * (start_N.to(copy_N.dtype).double() - copy_N.double())
    after_N = sum_N.float()
    delta_N = (1 + outer.momentum) * after_N.double() - outer.momentum * before_N
    return (start_N.double() - outer.lr * delta_N).float(), after_N
