"""Statistics of the routers and experts of a Mixture-of-Experts: load, entropy, specialisation, similarity of experts.

Axes: R routers (MoE layers), G groups of documents, E experts, K top-k, T real positions of a batch, N documents.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moedisco_ray.core.errors import RunError
from moedisco_ray.models import ModelMap, Role, family_of, log_probabilities, routers
from moedisco_ray.models.streamed import device_of_model
from moedisco_ray.training.objective import DEAD_LOAD

_COMPARED = 4096
"""Number of weights of each tensor of an expert that are compared with those of other experts. An expert has two or
three tensors, so the cosines of unrelated experts have a standard deviation of 0.011 or 0.009."""


@dataclasses.dataclass(frozen=True, eq=False)
class RouterStatistics:
    """Counts and entropies of all routers.

    Attributes:
        layers: Layer index of each router.
        selections_RGE: How often each expert was among the top k, per group of documents.
        top1_RGE: How often each expert was top-1, per group of documents.
        document_top1_RNE: How often each expert was top-1, per document.
        token_entropy_R: Mean over tokens of the entropy of the router's probabilities, in nats.
    """

    layers: tuple[int, ...]
    selections_RGE: NDArray[np.int64]
    top1_RGE: NDArray[np.int64]
    document_top1_RNE: NDArray[np.int32]
    token_entropy_R: NDArray[np.float64]


class RouterMeter:
    """Counts the routers' selections inside a `with` block, by forward hooks.

    Args:
        model: Has MoE layers.
        group_N: Group of each document, 0 to `groups` - 1.
        groups: Number of groups.

    Raises:
        RunError: The model has no router.
    """

    def __init__(self, model: PreTrainedModel, group_N: NDArray[np.int64], groups: int) -> None:
        self._routers = routers(model)
        if not self._routers:
            raise RunError("the model has no router: it is no Mixture-of-Experts")
        self._kind = family_of(model).router
        self._experts = len(next(iter(self._routers.values())).get_parameter(self._kind.weight))
        device = device_of_model(model)
        shape = (len(self._routers), groups, self._experts)
        self._group_N = torch.from_numpy(group_N).to(device)
        self._selections_RGE = torch.zeros(shape, dtype=torch.int64, device=device)
        self._top1_RGE = torch.zeros(shape, dtype=torch.int64, device=device)
        shape = (len(self._routers), len(group_N), self._experts)
        self._document_top1_RNE = torch.zeros(shape, dtype=torch.int32, device=device)
        self._entropy_R = torch.zeros(len(self._routers), dtype=torch.float64, device=device)
        self._tokens = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for number, module in enumerate(self._routers.values()):
            self._handles.append(
                module.register_forward_hook(
                    lambda _module, _inputs, output, number=number: self._count(number, output)
                )
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def observe(self, real_BL: Tensor, document_B: Tensor) -> None:
        """Set, for the next batch, which positions are not padding, and which document each row belongs to."""
        self._real_T = real_BL.flatten()
        self._document_T = document_B[:, None].expand_as(real_BL)[real_BL]

    def statistics(self) -> RouterStatistics:
        """Counts and entropies over all tokens that the routers have seen so far."""
        return RouterStatistics(
            layers=tuple(self._routers),
            selections_RGE=self._selections_RGE.cpu().numpy(),
            top1_RGE=self._top1_RGE.cpu().numpy(),
            document_top1_RNE=self._document_top1_RNE.cpu().numpy(),
            token_entropy_R=(self._entropy_R / max(1, self._tokens)).cpu().numpy(),
        )

    def _count(self, number: int, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _, indices = output
        self._tokens += len(self._document_T) if number == 0 else 0
        log_TE = log_probabilities(logits.reshape(-1, self._experts)[self._real_T].float(), self._kind)
        chosen_TK = indices.reshape(len(self._real_T), -1)[self._real_T]
        group_T = self._group_N[self._document_T]
        self._entropy_R[number] -= (log_TE.exp() * log_TE).sum(dim=-1).double().sum()
        _tally(self._selections_RGE[number], group_T[:, None].expand_as(chosen_TK), chosen_TK)
        _tally(self._top1_RGE[number], group_T, log_TE.argmax(dim=-1))
        _tally(self._document_top1_RNE[number], self._document_T, log_TE.argmax(dim=-1))


def expert_load(selections_XE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Share of each expert (last axis) in the selections; zeros if nothing was selected."""
    total = selections_XE.sum(axis=-1, keepdims=True)
    return selections_XE / np.maximum(total, 1)


def dead_experts(load_E: NDArray[np.float64]) -> int:
    """Number of experts whose load is below `DEAD_LOAD` times the balanced load, 1 / E for E experts."""
    return int((load_E < DEAD_LOAD / len(load_E)).sum())


def expert_similarity(tensors: Mapping[str, Tensor], names: ModelMap) -> dict[int, float]:
    """How alike the experts of each layer are: the mean over experts of the cosine with the closest other expert.

    Copies of one expert have 1. Experts that were drawn at random have nearly 0: the closest of 127 others has 0.03. A
    part of each tensor is compared, one layer after the other.

    Args:
        tensors: Canonical tensors of the model.
        names: Names of its tensors.
    """
    keys: collections.defaultdict[int, list[str]] = collections.defaultdict(list)
    for key in tensors:
        role = names.classify(key)
        if role.role is Role.EXPERT and role.layer is not None:
            keys[role.layer].append(key)
    return {layer: _closest(_compared(tensors, names, found)) for layer, found in keys.items()}


def _compared(tensors: Mapping[str, Tensor], names: ModelMap, keys: Sequence[str]) -> Iterable[list[Tensor]]:
    """What is compared of each expert of a layer: parts of its weights."""
    parts: collections.defaultdict[int, list[Tensor]] = collections.defaultdict(list)
    for key in keys:
        tensor, role = tensors[key], names.classify(key)
        each = [tensor] if role.expert_axis is None else tensor.unbind(role.expert_axis)
        for expert, one in enumerate(each, role.expert or 0):
            parts[expert].append(one.flatten()[:_COMPARED].to(torch.float32, copy=True))
    return parts.values()


def _closest(experts: Iterable[list[Tensor]]) -> float:
    """Mean over experts, each given by parts of its weights, of the cosine with the closest other expert."""
    weights_EN = torch.stack([torch.cat(parts) for parts in experts])
    unit_EN = torch.nn.functional.normalize(weights_EN, dim=1)
    cosine_EE = unit_EN @ unit_EN.T
    cosine_EE.fill_diagonal_(-1.0)
    return float(cosine_EE.amax(dim=1).mean()) if len(cosine_EE) > 1 else 0.0


def entropy(shares_E: NDArray[np.float64]) -> float:
    """Entropy -sum p ln p of the shares of E experts (nats): 0 if one expert gets all tokens, ln E if all are equal."""
    positive = shares_E[shares_E > 0]
    return float(-(positive * np.log(positive)).sum()) + 0.0


def normalized_mutual_information(counts_GE: NDArray[np.int64]) -> float:
    """Normalised mutual information of two labelings, from the table of their counts: between 0 and 1.

    Mutual information divided by the arithmetic mean of the two entropies (Vinh et al., JMLR 2010, NMI_sum), the
    default of scikit-learn; 1 if both labelings have one class, as in scikit-learn.
    """
    total = counts_GE.sum()
    if not total:
        return 0.0
    joint_GE = counts_GE / total
    row_G, column_E = joint_GE.sum(axis=1), joint_GE.sum(axis=0)
    mean = (entropy(row_G) + entropy(column_E)) / 2
    if mean == 0:
        return 1.0
    return max(0.0, entropy(row_G) + entropy(column_E) - entropy(joint_GE.ravel())) / mean


def _tally(counts_XE: Tensor, row_T: Tensor, column_T: Tensor) -> None:
    flat = (row_T * counts_XE.shape[1] + column_T).flatten()
    counts_XE.view(-1).scatter_add_(0, flat, torch.ones_like(flat, dtype=counts_XE.dtype))
