"""Rules that combine the sub-models' copies of a backbone tensor into one tensor.

Every rule works on deltas from the tensor that all sub-models started from, or had in common at their last sync point:

    theta = start + scale x combine(theta_1 - start, .., theta_C - start)

* `uniform`, `token_weighted`: the weighted mean sum_k gamma_k delta_k (MoE-DisCo section 3; WP-SGD).
* `ties`: trim each delta to its largest share, elect per element the sign of the larger sum, and take the mean over those
  sub-models whose kept element has that sign (Yadav et al. 2023, arXiv 2306.01708).
* `dare`: drop each element of a delta with probability p and multiply the rest by 1 / (1 - p), which keeps its
  expectation; then the mean (Yu et al. 2024, arXiv 2311.03099).

TIES trims each tensor on its own here, because tensors are streamed; its paper trims over the whole model.

Shapes: C sub-models, N elements of a tensor, M elements of a chunk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moedisco_ray.core.config import Merge
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import same_bits

BackboneRule = Literal["uniform", "token_weighted", "ties", "dare"]
RULES: tuple[BackboneRule, ...] = ("uniform", "token_weighted", "ties", "dare")
SCALES = (0.75, 1.0, 1.25)
"""Multiples of the combined delta that `auto` tries with every rule."""
_CHUNK = 1 << 22    # elements combined at a time: 32 MB per sub-model in float64

_Combine = Callable[[Tensor], Tensor]
"""Function that combines the sub-models' deltas [C, M] of a chunk into one [M]; called once per chunk, in order."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How backbones are merged.

    Attributes:
        rule: One of `RULES`; see the docstring of the module.
        weights: gamma_k, one per sub-model; they sum to 1.
        scale: Multiple of the combined delta; 1 is the plain rule.
        keep: Share of a delta's elements that TIES keeps; its paper keeps a fifth.
        drop: Share of a delta's elements that DARE drops.
        seed: Seed of the elements that DARE drops.
    """

    rule: BackboneRule
    weights: tuple[float, ...]
    scale: float = 1.0
    keep: float = 0.2
    drop: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if abs(sum(self.weights) - 1.0) > 1e-6:
            raise CheckpointError("weights", list(self.weights), "must sum to 1")

    def to_dict(self) -> dict[str, Any]:
        """The entries `rule` and `scale` of `merge.json`."""
        return {"rule": self.rule, "scale": self.scale}


def recipes(settings: Merge, tokens: Sequence[int], seed: int) -> list[Recipe]:
    """The recipes that a merge section allows: one, or with `auto` every rule at every scale.

    TIES and DARE weight all sub-models equally, as their papers do. `token_weighted` weights them by `tokens`, the tokens that
    each was trained on. A single sub-model has nothing to merge.
    """
    if len(tokens) == 1:
        return [Recipe("uniform", (1.0,))]
    auto = settings.backbone == "auto"
    return [
        Recipe(rule, merge_weights(rule, tokens), scale, seed=seed)
        for rule in RULES if auto or rule == settings.backbone
        for scale in (SCALES if auto else (1.0,))]


def merge_weights(rule: BackboneRule, tokens: Sequence[int]) -> tuple[float, ...]:
    """The backbone's weights gamma_k: equal, or proportional to the tokens that each sub-model was trained on; they sum to 1.

    A sub-model without any training has weight 0, unless none was trained.
    """
    counts = [1 if rule != "token_weighted" and count else count for count in tokens]
    total = sum(counts)
    return tuple(count / total if total else 1.0 / len(counts) for count in counts)


def combine(key: str, copies: Sequence[Tensor], start: Tensor, recipe: Recipe) -> tuple[Tensor, float | None]:
    """Combine the sub-models' copies of one tensor, and measure their largest relative distance from the result.

    Everything is computed in float64 and rounded once. TIES' thresholds need whole deltas; the rest is computed in chunks.

    Args:
        key: The tensor's name, for errors, and for the seed of DARE's choice.
        copies: One copy per sub-model.
        start: The tensor that all copies were trained from.
        recipe: The rule to combine by.

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
    rule = _combination(key, flat_CN, start_N, recipe)
    merged_N = torch.empty_like(flat_CN[0])
    norm, distance_C = 0.0, torch.zeros(len(copies), dtype=torch.float64)
    for at in range(0, len(merged_N), _CHUNK):
        chunk = slice(at, at + _CHUNK)
        start_M = start_N[chunk].double()
        delta_CM = torch.stack([flat_N[chunk].double() for flat_N in flat_CN]) - start_M
        moved_M = recipe.scale * rule(delta_CM)
        merged_M = start_M + moved_M
        merged_N[chunk] = merged_M.to(first.dtype)
        norm += float(merged_M.square().sum())
        distance_C += (delta_CM - moved_M).square().sum(1)
    deviation = float((distance_C / max(norm, 1e-300)).sqrt().max())
    return merged_N.reshape(first.shape), deviation


def _combination(key: str, flat_CN: Sequence[Tensor], start_N: Tensor, recipe: Recipe) -> _Combine:
    weight_C1 = torch.tensor(recipe.weights, dtype=torch.float64)[:, None]
    if recipe.rule == "ties":
        least_C1 = torch.stack([_least_kept(flat_N, start_N, recipe.keep) for flat_N in flat_CN])[:, None]
        return lambda delta_CM: disjoint_mean(torch.where(delta_CM.abs() >= least_C1, delta_CM, 0.0), weight_C1)
    if recipe.rule == "dare":
        sources = [_source(recipe.seed, key, k) for k in range(len(flat_CN))]

        def dropped_mean(delta_CM: Tensor) -> Tensor:
            uniform_CM = np.stack([source.random(delta_CM.shape[1]) for source in sources])
            kept_CM = torch.from_numpy(uniform_CM >= recipe.drop)
            return (weight_C1 * delta_CM * kept_CM).sum(0) / (1.0 - recipe.drop)

        return dropped_mean
    return lambda delta_CM: (weight_C1 * delta_CM).sum(0)


def disjoint_mean(delta_CM: Tensor, weight_C1: Tensor) -> Tensor:
    """The last two steps of TIES on trimmed deltas: per element, take the sum's sign and average the deltas that have it; [M]."""
    sign_M = (weight_C1 * delta_CM).sum(0).sign()
    agreeing_CM = weight_C1 * (delta_CM * sign_M > 0)
    return (agreeing_CM * delta_CM).sum(0) / agreeing_CM.sum(0).clamp(min=torch.finfo(torch.float64).tiny)


def _least_kept(flat_N: Tensor, start_N: Tensor, keep: float) -> Tensor:
    """Smallest magnitude among the `keep` x N largest elements of a delta, float64; at least one element is kept."""
    magnitude_N = (flat_N.double() - start_N.double()).abs()
    kept = max(1, math.ceil(keep * len(magnitude_N)))
    return magnitude_N.kthvalue(len(magnitude_N) - kept + 1).values


def _source(seed: int, key: str, submodel: int) -> np.random.Generator:
    # Each copy of each tensor has a random stream of its own, so that the order of the tensors does not matter.
    name = int.from_bytes(hashlib.blake2b(f"{key} {submodel}".encode(), digest_size=8).digest(), "big")
    return np.random.Generator(np.random.Philox(key=[seed, name]))
