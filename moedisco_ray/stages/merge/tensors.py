"""Join sub-models tensor by tensor: the inverse of `decompose`.

Experts are taken unchanged and renumbered, router rows are concatenated, and the backbone with the shared expert is the
sub-models' weighted mean.

Shapes: C sub-models, g experts in each, E = C g, D hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import ModelMap, Role
from moedisco_ray.stages.merge.backbone import Change, combine, weighted_mean

Rule = Literal["copied", "combined", "identical", "concatenated"]


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """How one merged tensor was made, and from which sub-models.

    Attributes:
        key: Canonical name of the tensor.
        role: Role of the tensor in the model.
        rule: Whether it was copied, concatenated or combined, or is identical in all sub-models.
        submodels: The sub-models that it came from.
        deviation: Largest |theta_k - theta| / |theta| over the sub-models' copies; 0 if they were not combined.
    """

    key: str
    role: Role
    rule: Rule
    submodels: tuple[int, ...]
    deviation: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {**dataclasses.asdict(self), "role": self.role.value, "submodels": list(self.submodels)}


def merge(
    submodels: Sequence[Mapping[str, Tensor]],
    start: Mapping[str, Tensor],
    model_map: ModelMap,
    weights: Sequence[float],
    change: Change = weighted_mean,
) -> Iterator[tuple[Tensor, TensorReport]]:
    """The merged model, one tensor at a time, each with a report of its sources.

    Every tensor of every sub-model is used exactly once. A backbone tensor that is identical in all sub-models
    is kept bit for bit.

    Args:
        submodels: Canonical tensors of each sub-model; all have the same number of experts.
        start: Holds the backbone that all sub-models had at their last sync point, or started from if they had no sync
            point. Its other tensors are not read.
        model_map: Tensor names of the family.
        weights: Weight of each sub-model in the backbone; they sum to 1.
        change: How the deltas of a backbone tensor are combined.

    Raises:
        CheckpointError: The sub-models do not have the same tensors, one is unknown, or shapes differ.
    """
    if not submodels or len(submodels) != len(weights):
        raise CheckpointError("submodels", len(submodels), f"cannot be merged with {len(weights)} weights")
    _same_keys(submodels)
    groups = model_map.experts(submodels[0])
    source = _Once(submodels)
    written: set[str] = set()
    for key in submodels[0]:
        for tensor, report in _joined(
            key, source, start=start, model_map=model_map, groups=groups, weights=weights, change=change
        ):
            if report.key in written:
                raise CheckpointError("tensor", report.key, "is written twice")
            written.add(report.key)
            yield tensor, report
    source.check_all_taken()


class _Once:
    """Hands out every tensor of every sub-model once."""

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


def _joined(
    key: str,
    source: _Once,
    *,
    start: Mapping[str, Tensor],
    model_map: ModelMap,
    groups: Mapping[int, int],
    weights: Sequence[float],
    change: Change,
) -> Iterator[tuple[Tensor, TensorReport]]:
    """Merge the sub-models' tensors named `key`: into one tensor, or, for an expert, one tensor per sub-model."""
    role = model_map.classify(key)
    if role.layer is not None and role.expert is not None:
        for index in source.everyone:
            name = model_map.renumbered(key, index * groups[role.layer] + role.expert)
            yield source.take(index, key), TensorReport(name, role.role, "copied", (index,))
        return
    copies = [source.take(index, key) for index in source.everyone]
    axis = role.expert_axis
    if axis is not None:
        # a stack has as many rows as in the first sub-model
        rows = groups.get(role.layer or 0) or copies[0].shape[axis]
        if any(copy.shape[axis] != rows for copy in copies):
            raise CheckpointError("tensor", key, "has not one row per expert of its sub-model")
        yield torch.cat(copies, dim=axis), TensorReport(key, role.role, "concatenated", source.everyone)
        return
    if key not in start:
        raise CheckpointError("tensor", key, "is not in the backbone that all sub-models started from")
    tensor, deviation = combine(key, copies, start[key], weights, change)
    rule: Rule = "identical" if deviation is None else "combined"
    yield tensor, TensorReport(key, role.role, rule, source.everyone, deviation or 0.0)


def _same_keys(submodels: Sequence[Mapping[str, Tensor]]) -> None:
    keys = set(submodels[0])
    for index, submodel in enumerate(submodels[1:], start=1):
        if odd := keys.symmetric_difference(submodel):
            raise CheckpointError("tensor", min(odd), f"is only in one of the models 0 and {index} of those to merge")
