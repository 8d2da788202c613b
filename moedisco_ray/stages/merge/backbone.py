"""Combine the sub-models' copies of a backbone tensor into one tensor: their weighted mean (MoE-DisCo section 3; WP-SGD).

The mean is taken over deltas from `start`, the tensor that all sub-models had at their last sync point. Without sync points, it is
the tensor with which their training began:

    theta = start + sum_k gamma_k (theta_k - start)

Shapes: C sub-models, N elements of a tensor, M elements of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import same_bits

BackboneRule = Literal["uniform", "token_weighted"]
_CHUNK = 1 << 18
"""Number of elements that are combined at a time, counting the copies of all sub-models. In float64 they take 2 MB, which fits into
a processor's cache."""


def merge_weights(rule: BackboneRule, tokens: Sequence[int]) -> tuple[float, ...]:
    """The backbone's weights gamma_k: equal, or proportional to the tokens that each sub-model was trained on; they sum to 1.

    A sub-model without any training has weight 0. If no sub-model was trained, all weights are equal.
    """
    counts = [1 if rule == "uniform" and count else count for count in tokens]
    total = sum(counts)
    return tuple(count / total if total else 1.0 / len(counts) for count in counts)


def combine(key: str, copies: Sequence[Tensor], start: Tensor, weights: Sequence[float]) -> tuple[Tensor, float | None]:
    """Combine the sub-models' copies of one tensor, and measure their largest relative distance from the result.

    Everything is computed in float64, in chunks, and rounded once.

    Args:
        key: The tensor's name, for errors.
        copies: One copy per sub-model.
        start: The tensor that all copies were trained from.
        weights: gamma_k, one per sub-model; they sum to 1.

    Returns:
        The tensor, and max_k |theta_k - theta| / |theta|; if all copies are equal bit for bit, the first copy and None.

    Raises:
        CheckpointError: Shapes or types differ.
    """
    first = copies[0]
    if any(copy.shape != first.shape or copy.dtype != first.dtype for copy in copies) or start.shape != first.shape:
        raise CheckpointError("tensor", key, "has another shape or type in another sub-model")
    if all(same_bits(first, copy) for copy in copies[1:]):
        return first, None
    start_N, flat_CN = start.reshape(-1), [copy.reshape(-1) for copy in copies]
    merged_N = torch.empty_like(flat_CN[0])
    size = max(1, _CHUNK // len(copies))
    delta_CN = torch.empty(len(copies), min(size, len(merged_N)), dtype=torch.float64)    # reused, because new memory costs time
    norm, distance_C = 0.0, torch.zeros(len(copies), dtype=torch.float64)
    for at in range(0, len(merged_N), size):
        chunk = slice(at, at + size)
        start_M = start_N[chunk].double()
        delta_CM = delta_CN[:, :len(start_M)]
        moved_M = torch.zeros_like(start_M)
        for delta_M, flat_N, weight in zip(delta_CM, flat_CN, weights, strict=True):
            moved_M.add_(delta_M.copy_(flat_N[chunk]).sub_(start_M), alpha=weight)
        distance_C += torch.linalg.vector_norm(delta_CM.sub_(moved_M), dim=1).square()
        merged_M = moved_M.add_(start_M)
        merged_N[chunk] = merged_M
        norm += float(torch.linalg.vector_norm(merged_M).square())
    deviation = float((distance_C / max(norm, 1e-300)).sqrt().max())
    return merged_N.reshape(first.shape), deviation
