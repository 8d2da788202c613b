"""The outer step of a sync point: SGD with Nesterov momentum on the mean delta of the members.

DiLoCo (arXiv 2311.08105, algorithm 1) with the momentum of torch.optim.SGD. From common weights g, members k with
shares w_k have trained theta_k:

    d = sum_k w_k (g - theta_k),    m' = mu m + d,    g' = g - lr (d + mu m').

Both results are streams of tensors, and d needs every member. So m' is computed first, from the members, and then g'
from m and m' alone, since d = m' - mu m.

Everything is computed in float64, a chunk at a time, and rounded once; g and m are stored in float32. Members are
summed in their order. Shape: N elements of a chunk of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moedisco_ray.core.config import Outer

CHUNK = 1 << 22
"""Maximum number of elements of a tensor that are computed at a time; they take 32 MiB in float64."""


def next_momentum(
    start: Mapping[str, Tensor],
    members: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    momentum: Mapping[str, Tensor] | None,
    outer: Outer,
) -> Iterator[tuple[str, Tensor]]:
    """The momentum m' after the outer step, tensor by tensor.

    Args:
        start: Common weights g, in float32. A member in bf16 started from g rounded to bf16.
        members: Weights theta_k of the members.
        weights: Shares w_k; they sum to 1.
        momentum: Momentum m; None means 0.
        outer: Settings of the outer step; mu is its `momentum`.
    """

    def step(start_N: Tensor, *others_N: Tensor) -> Tensor:
        copies, before = others_N[: len(members)], others_N[len(members) :]
        after_N = outer.momentum * before[0].double() if before else torch.zeros_like(start_N, dtype=torch.float64)
        for weight, copy_N in zip(weights, copies, strict=True):
            after_N += weight * (start_N.to(copy_N.dtype).double() - copy_N.double())
        return after_N

    for key in start:
        yield key, _in_chunks(step, start[key], *(member[key] for member in members), *_of(momentum, key))


def next_common(
    start: Mapping[str, Tensor], momentum: Mapping[str, Tensor] | None, after: Mapping[str, Tensor], outer: Outer
) -> Iterator[tuple[str, Tensor]]:
    """The common weights g' after the outer step, tensor by tensor.

    Args:
        start: Common weights g.
        momentum: Momentum m; None means 0.
        after: New momentum m'.
        outer: Settings of the outer step: lr, and mu as `momentum`.
    """

    def step(start_N: Tensor, after_N: Tensor, *before: Tensor) -> Tensor:
        delta_N = (1 + outer.momentum) * after_N.double()
        for before_N in before:
            delta_N -= outer.momentum * before_N.double()
        return start_N.double() - outer.lr * delta_N

    for key in start:
        yield key, _in_chunks(step, start[key], after[key], *_of(momentum, key))


def _of(momentum: Mapping[str, Tensor] | None, key: str) -> tuple[Tensor, ...]:
    return () if momentum is None else (momentum[key],)


def _in_chunks(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    flat = [tensor.reshape(-1) for tensor in tensors]
    result_N = torch.empty_like(flat[0], dtype=torch.float32)
    for start in range(0, len(result_N), CHUNK):
        result_N[start : start + CHUNK] = function(*(flat_N[start : start + CHUNK] for flat_N in flat))
    return result_N.reshape(tensors[0].shape)
