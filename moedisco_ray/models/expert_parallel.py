"""Experts that are divided among a group of workers: tokens travel to the worker that has their expert, and back.

Each worker has the experts [r E/R, (r+1) E/R) of every layer, for its rank r of R in the group (GShard, arXiv
2006.16668; the name expert parallelism is DeepSpeed's). The number of tokens of each expert is exchanged first, so
nothing is padded or dropped.

Shapes: T tokens, K selected experts, S = T K selections of this worker, Z selections that it receives, E experts, D
hidden.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.tensor import DTensor

from moedisco_ray.models.grouped import Rows

EXPERT_AXIS = "expert"
"""Name of the axis of workers, in a device mesh, among which experts are divided."""


class Compute(Protocol):
    """A function of an experts' module, tokens, selected experts and their weights; returns the weighted sums."""

    def __call__(
        self, experts: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, counts: list[int] | None, /
    ) -> Tensor:
        """Compute; `counts` says how often each expert is selected, and None that this is not known."""


def divide(experts: nn.Module, group: dist.ProcessGroup) -> None:
    """Let the forward pass of an experts' module, whose weights are sharded by experts, exchange tokens in a group."""
    experts.expert_group = group


def is_divided(parameter: Tensor) -> bool:
    """Whether a parameter is one of experts that are divided among workers."""
    return isinstance(parameter, DTensor) and EXPERT_AXIS in (parameter.device_mesh.mesh_dim_names or ())


def group_of(experts: Any) -> dist.ProcessGroup | None:
    """The group among which a module's experts are divided; None: it has all of them."""
    return getattr(experts, "expert_group", None)


def divided_experts(
    experts: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, *, group: dist.ProcessGroup, compute: Compute
) -> Tensor:
    """Compute the weighted sum of the selected experts' outputs, with the experts of all workers of a group.

    Args:
        experts: The experts' module.
        x_TD: Input tokens of this worker.
        expert_TK: Indices of the selected experts.
        weight_TK: Weights of the selected experts.
        group: The group of workers.
        compute: Computes experts that this worker has.
    """
    T, K = expert_TK.shape
    workers = dist.get_world_size(group)
    own = _OwnExperts(experts, workers)
    expert_S, order_S = torch.sort(expert_TK.reshape(-1), stable=True)
    ends_E = Rows(expert_S, experts.num_experts).ends_E
    sent_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1))
    received_E = torch.empty_like(sent_E)  # by sender, then by expert
    dist.all_to_all_single(received_E, sent_E, group=group)
    # the only wait for the GPU
    sent, received = torch.stack([sent_E, received_E]).view(2, workers, own.num_experts).tolist()
    to_each, from_each = [sum(counts) for counts in sent], [sum(counts) for counts in received]
    every_Z = torch.arange(sum(from_each), device=x_TD.device)
    expert_Z = torch.searchsorted(received_E.cumsum(dim=0), every_Z, right=True) % own.num_experts
    x_ZD = all_to_all_single_autograd(x_TD[order_S // K], from_each, to_each, group)
    counts = [sum(each) for each in zip(*received, strict=True)]
    y_ZD = compute(own, x_ZD, expert_Z[:, None], torch.ones_like(expert_Z[:, None], dtype=weight_TK.dtype), counts)
    y_SD = all_to_all_single_autograd(y_ZD, to_each, from_each, group) * weight_TK.reshape(-1)[order_S, None]
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(T * K, device=order_S.device)
    return y_SD[inverse_S].view(T, K, x_TD.shape[1]).sum(dim=1).to(x_TD.dtype)


class _OwnExperts:
    """The experts of a module that this worker has, in the form that `compute` takes."""

    expert_group = None

    def __init__(self, experts: nn.Module, workers: int) -> None:
        self._experts = experts
        self.num_experts = int(experts.num_experts) // workers  # type: ignore[arg-type]  # no tensor
        for name, weight in experts.named_parameters(recurse=False):
            setattr(self, name, weight.to_local() if isinstance(weight, DTensor) else weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)
