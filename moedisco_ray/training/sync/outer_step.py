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
    deltas = (start_N.to(copy_N.dtype).double() - copy_N.double() for copy_N in copies)
    before_N = torch.zeros_like(start_N) if momentum_N is None else momentum_N
    update_N, after_N = outer_update(deltas, weights, before_N, outer)
    return (start_N.double() + update_N).float(), after_N


def outer_update(
    deltas: Iterable[Tensor], weights: Sequence[float], momentum_N: Tensor, outer: Outer
) -> tuple[Tensor, Tensor]:
    """The change g' - g of the common weights, in float64, and the momentum m', in float32.

    Args:
        deltas: Deltas g - theta_k of the members, each taken once, in order.
        weights: Shares w_k; they sum to 1.
        momentum_N: Momentum m.
        outer: Settings of the outer step: lr, and mu as `momentum`.
    """
    before_N = momentum_N.double()
    sum_N = outer.momentum * before_N
    for weight, delta_N in zip(weights, deltas, strict=True):
        sum_N += weight * delta_N.double()
    after_N = sum_N.float()
    return -outer.lr * ((1 + outer.momentum) * after_N.double() - outer.momentum * before_N), after_N
