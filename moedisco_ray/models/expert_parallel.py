"""Experts that are divided among a group of workers: tokens travel to the worker that has their expert, and back.

Each worker has the experts [r E/R, (r+1) E/R) of every layer, for its rank r of R in the group (GShard, arXiv
2006.16668; the name expert parallelism is DeepSpeed's). The number of tokens of each expert is exchanged first, so
nothing is padded or dropped.

Shapes: T tokens, K selected experts, S = T K selections of this worker, Z selections that it receives, E experts, D
hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.tensor import DTensor

EXPERT_AXIS = "expert"
"""Name of the axis of workers, in a device mesh, among which experts are divided."""
Compute = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""A function of an experts' module, tokens, selected experts and their weights; returns the weighted sums."""


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
    own = _OwnExperts(experts, dist.get_world_size(group))
    flat_S = expert_TK.reshape(-1)
    order_S = torch.argsort(flat_S, stable=True)
    sent_E = torch.bincount(flat_S, minlength=experts.num_experts)
    received_E = torch.empty_like(sent_E)  # by sender, then by expert
    dist.all_to_all_single(received_E, sent_E, group=group)
    to_each, from_each = (counts_E.view(-1, own.num_experts).sum(dim=1).tolist() for counts_E in (sent_E, received_E))
    expert_Z = (
        torch.arange(own.num_experts, device=x_TD.device)
        .repeat(len(from_each))
        .repeat_interleave(received_E, output_size=sum(from_each))
    )  # without the size, the CPU would wait for the GPU once more
    x_ZD = all_to_all_single_autograd(x_TD[order_S // K], from_each, to_each, group)
    y_ZD = compute(own, x_ZD, expert_Z[:, None], torch.ones_like(expert_Z[:, None], dtype=weight_TK.dtype))
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
