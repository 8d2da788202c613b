"""Joining sub-models tensor by tensor: the inverse of `decompose`.

Experts are taken unchanged and renumbered, router rows are concatenated, and the backbone with the shared expert is the
weighted mean sum_k gamma_k theta_k (METHOD section 1, step 4).

Shapes: C sub-models, g experts in each, E = C g, D hidden, N elements of a tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moedisco_ray.errors import CheckpointError
from moedisco_ray.model_map import ModelMap, Role, same_bits

Rule = Literal["copied", "averaged", "identical", "concatenated"]
_CHUNK = 1 << 22    # elements that are averaged at a time: 32 MB in float64


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """What went into one merged tensor.

    Attributes:
        key: Its canonical name.
        role: What it does.
        rule: How it was made.
        submodels: Which sub-models it came from.
        deviation: Largest |theta_k - mean| / |mean| over the sub-models' copies; 0 where they were not averaged.
    """

    key: str
    role: Role
    rule: Rule
    submodels: tuple[int, ...]
    deviation: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**dataclasses.asdict(self), "role": self.role.value, "submodels": list(self.submodels)}


def merge_weights(rule: Literal["uniform", "token_weighted"], tokens: Sequence[int]) -> tuple[float, ...]:
    """The backbone's weights gamma_k: equal, or by the tokens that each sub-model was trained on; they sum to 1."""
    total = sum(tokens)
    if rule == "uniform" or total == 0:
        return tuple(1.0 / len(tokens) for _ in tokens)
    return tuple(count / total for count in tokens)


def merge(submodels: Sequence[Mapping[str, Tensor]], model_map: ModelMap,
          weights: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
    """The merged model's canonical tensors; see `merge_with_report`."""
    for tensor, report in merge_with_report(submodels, model_map, weights):
        yield report.key, tensor


def merge_with_report(submodels: Sequence[Mapping[str, Tensor]], model_map: ModelMap,
                      weights: Sequence[float]) -> Iterator[tuple[Tensor, TensorReport]]:
    """The merged model, one tensor at a time, each with what went into it.

    Every tensor of every sub-model is used exactly once. A backbone tensor that is the same in all sub-models comes out
    bit for bit as it went in.

    Args:
        submodels: Canonical tensors of each, with equally many experts.
        model_map: Names of their family.
        weights: gamma_k; they sum to 1.

    Raises:
        CheckpointError: The sub-models do not have the same tensors, one is unknown, or shapes differ.
    """
    if not submodels or len(submodels) != len(weights):
        raise CheckpointError("submodels", len(submodels), f"cannot be merged with {len(weights)} weights")
    if abs(sum(weights) - 1.0) > 1e-6:
        raise CheckpointError("weights", list(weights), "must sum to 1")
    _same_keys(submodels)
    groups = model_map.experts(submodels[0])
    source = _Once(submodels)
    written: set[str] = set()
    for key in submodels[0]:
        for tensor, report in _joined(key, source, model_map, groups, weights):
            if report.key in written:
                raise CheckpointError("tensor", report.key, "is written twice")
            written.add(report.key)
            yield tensor, report
    source.check_all_taken()


class _Once:
    """Hands out every tensor of every sub-model once, and knows which are left."""

    def __init__(self, submodels: Sequence[Mapping[str, Tensor]]) -> None:
        self._submodels = submodels
        self._left = {(index, key) for index, submodel in enumerate(submodels) for key in submodel}
        self.everyone = tuple(range(len(submodels)))

    def take(self, index: int, key: str) -> Tensor:
        if (index, key) not in self._left:
            raise CheckpointError("tensor", key, f"of sub-model {index} is used twice")
        self._left.remove((index, key))
        return self._submodels[index][key]

    def check_all_taken(self) -> None:
        if self._left:
            index, key = min(self._left)
            raise CheckpointError("tensor", key, f"of sub-model {index} is not used, with {len(self._left) - 1} more")


def _joined(key: str, source: _Once, model_map: ModelMap, groups: Mapping[int, int],
            weights: Sequence[float]) -> Iterator[tuple[Tensor, TensorReport]]:
    """What the sub-models' tensors of this name become: one tensor, or one per sub-model for an expert's."""
    role = model_map.classify(key)
    if role.layer is not None and role.expert is not None:
        for index in source.everyone:
            name = model_map.renumbered(key, index * groups[role.layer] + role.expert)
            yield source.take(index, key), TensorReport(name, role.role, "copied", (index,))
        return
    copies = [source.take(index, key) for index in source.everyone]
    if role.role is Role.ROUTER:
        if role.layer is None or any(len(copy) != groups[role.layer] for copy in copies):
            raise CheckpointError("tensor", key, "has not one row per expert of its sub-model")
        yield torch.cat(copies), TensorReport(key, role.role, "concatenated", source.everyone)
        return
    mean, deviation = weighted_mean(key, copies, weights)
    rule: Rule = "identical" if deviation is None else "averaged"
    yield mean, TensorReport(key, role.role, rule, source.everyone, deviation or 0.0)


def weighted_mean(key: str, copies: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, float | None]:
    """The weighted mean of one tensor's copies, and their largest relative distance from it.

    The sum is taken in float64, a chunk at a time, and rounded once.

    Args:
        key: Its name, for the error.
        copies: One per sub-model.
        weights: gamma_k.

    Returns:
        The mean, and max_k |theta_k - mean| / |mean|; None when all copies are equal
        bit for bit, so that nothing was averaged.

    Raises:
        CheckpointError: Shapes or types differ.
    """
    first = copies[0]
    if any(copy.shape != first.shape or copy.dtype != first.dtype for copy in copies):
        raise CheckpointError("tensor", key, "has another shape or type in another sub-model")
    if all(same_bits(first, copy) for copy in copies[1:]):
        return first, None
    flat_CN = [copy.reshape(-1) for copy in copies]
    mean_N = torch.empty_like(flat_CN[0])
    norm, distance_C = 0.0, torch.zeros(len(copies), dtype=torch.float64)
    for start in range(0, len(mean_N), _CHUNK):
        part_CN = torch.stack([flat_N[start:start + _CHUNK].double() for flat_N in flat_CN])
        part_N = (torch.tensor(weights, dtype=torch.float64)[:, None] * part_CN).sum(0)
        mean_N[start:start + _CHUNK] = part_N.to(first.dtype)
        norm += float(part_N.square().sum())
        distance_C += (part_CN - part_N).square().sum(1)
    deviation = float((distance_C / max(norm, 1e-300)).sqrt().max())
    return mean_N.reshape(first.shape), deviation


def _same_keys(submodels: Sequence[Mapping[str, Tensor]]) -> None:
    keys = set(submodels[0])
    for index, submodel in enumerate(submodels[1:], start=1):
        if odd := keys.symmetric_difference(submodel):
            raise CheckpointError("tensor", min(odd), f"is only in one of the sub-models 0 and {index}")
