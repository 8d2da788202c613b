"""Combine the sub-models' copies of a backbone tensor: their weighted mean (MoE-DisCo section 3; WP-SGD).

A rule combines deltas from `start`, the tensor that all sub-models had at their last sync point. Without sync points,
it is the tensor with which their training began. The mean is

    theta = start + sum_k gamma_k (theta_k - start)

Shapes: C sub-models, N elements of a tensor, M elements of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.registry import BACKBONE_RULES, load
from moedisco_ray.models import same_bits

CHUNK = 1 << 18
"""Number of elements that are combined at a time, counting the copies of all sub-models. In float64 they take 2 MB,
which fits into a processor's cache."""


Change = Callable[[Tensor, Sequence[float]], Tensor]
"""Computes what is added to the start [M], from the deltas of the sub-models [C, M], in float64, and their weights."""


def weighted_mean(delta_CM: Tensor, weights: Sequence[float]) -> Tensor:
    """The sub-models' mean delta [M]."""
    mean_M = torch.zeros_like(delta_CM[0])
    for delta_M, weight in zip(delta_CM, weights, strict=True):
        mean_M.add_(delta_M, alpha=weight)
    return mean_M


@dataclasses.dataclass(frozen=True)
class BackboneRule:
    """How the sub-models' backbones become one.

    Attributes:
        parts: Parts of the sub-models, from the number of tokens that each was trained on; weights are parts divided by
            their sum.
        change: How deltas are combined.
    """

    parts: Callable[[Sequence[int]], Sequence[float]]
    change: Change = weighted_mean


def _one_each(tokens: Sequence[int]) -> Sequence[float]:
    return [min(count, 1) for count in tokens]


UNIFORM = BackboneRule(_one_each)
"""All sub-models that were trained count equally."""
TOKEN_WEIGHTED = BackboneRule(tuple)
"""Each sub-model counts by its tokens."""


def backbone_rule(name: str) -> BackboneRule:
    """The rule of a name in `merge.backbone`."""
    rule: BackboneRule = load(BACKBONE_RULES[name])
    return rule


def merge_weights(rule: str, tokens: Sequence[int]) -> tuple[float, ...]:
    """The backbone's weights gamma_k under the rule of this name; they sum to 1.

    A sub-model without any training has weight 0. If no sub-model was trained, all weights are equal.
    """
    parts = backbone_rule(rule).parts(tokens)
    total = sum(parts)
    return tuple(part / total if total else 1.0 / len(parts) for part in parts)


def combine(
    key: str, copies: Sequence[Tensor], start: Tensor, weights: Sequence[float], change: Change = weighted_mean
) -> tuple[Tensor, float | None]:
    """Combine the sub-models' copies of one tensor, and measure their largest relative distance from the result.

    Everything is computed in float64, in chunks, and rounded once.

    Args:
        key: The tensor's name, for errors.
        copies: One copy per sub-model.
        start: The tensor that all copies were trained from.
        weights: gamma_k, one per sub-model; they sum to 1.
        change: How deltas are combined.

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
    size = max(1, CHUNK // len(copies))
    # reused, because new memory costs time
    delta_CN = torch.empty(len(copies), min(size, len(merged_N)), dtype=torch.float64)
    norm, distance_C = 0.0, torch.zeros(len(copies), dtype=torch.float64)
    for at in range(0, len(merged_N), size):
        chunk = slice(at, at + size)
        start_M = start_N[chunk].double()
        delta_CM = delta_CN[:, : len(start_M)]
        for delta_M, flat_N in zip(delta_CM, flat_CN, strict=True):
            delta_M.copy_(flat_N[chunk]).sub_(start_M)
        moved_M = change(delta_CM, weights)
        distance_C += torch.linalg.vector_norm(delta_CM.sub_(moved_M), dim=1).square()
        merged_M = moved_M.add_(start_M)
        merged_N[chunk] = merged_M
        norm += float(torch.linalg.vector_norm(merged_M).square())
    deviation = float((distance_C / max(norm, 1e-300)).sqrt().max())
    return merged_N.reshape(first.shape), deviation
