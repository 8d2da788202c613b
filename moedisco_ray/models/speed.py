"""Faster forward passes for transformers models; classes, tensor names and results do not change.

In a sub-model with one expert per layer, the router's weight is a softmax over one number, exactly 1. `specialise` makes such a
model run as the dense model that it is.

Shapes: T tokens, K selected experts, S = T K selections, E experts, D hidden, F expert hidden, G = 2F.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moedisco_ray.models.hf import moe_blocks

_IMPLEMENTATION = "moedisco_sorted"


def specialise(model: PreTrainedModel) -> PreTrainedModel:
    """Choose the fastest forward for each MoE block of a model, in place; return the model.

    A block with one expert skips its router. The router is frozen, because its gradient is zero and only weight decay would change
    it; the block records no router logits. Blocks with more experts use `sorted_experts`.
    """
    model.set_experts_implementation(_IMPLEMENTATION)
    for block in moe_blocks(model).values():
        router: Any = block.get_submodule("gate")
        if router.weight.shape[0] == 1:
            router.weight.requires_grad_(requires_grad=False)
            block.forward = types.MethodType(_one_expert_forward, block)
    return model


def sorted_experts(self: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Compute the weighted sum of the selected experts' outputs for each token; each expert runs once, on all its tokens.

    The result is deterministic. On a GPU, `grouped_experts` is called instead: the loop over experts would wait for the GPU.

    Args:
        self: The experts' module, with `gate_up_proj` w_EGD and `down_proj` w_EDF.
        x_TD: Input tokens.
        expert_TK: Indices of the selected experts.
        weight_TK: Weights of the selected experts.

    Returns:
        Output tokens y_TD.
    """
    if x_TD.is_cuda:
        return grouped_experts(self, x_TD, expert_TK, weight_TK)
    T, K = expert_TK.shape
    flat_S = expert_TK.reshape(-1)
    order_S = torch.argsort(flat_S, stable=True)
    counts = torch.bincount(flat_S, minlength=self.num_experts).tolist()
    pieces = torch.split(x_TD[order_S // K], counts)
    outputs = []
    # The backward pass of unbind stacks the gradients of the experts once; that of indexing would add up E gradients of the
    # whole stack.
    for piece_SD, w_GD, w_DF in zip(pieces, self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True):
        gate_SF, up_SF = functional.linear(piece_SD, w_GD).chunk(2, dim=-1)
        outputs.append(functional.linear(self.act_fn(gate_SF) * up_SF, w_DF))
    y_SD = torch.cat(outputs) * weight_TK.reshape(-1)[order_S, None]
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(T * K, device=order_S.device)
    return y_SD[inverse_S].view(T, K, -1).sum(dim=1).to(x_TD.dtype)


def grouped_experts(self: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Compute the same as `sorted_experts` with transformers' grouped matrix product, which needs two kernels for all experts.

    The CPU does not wait for the GPU. The grouped product ignores autocast and computes in the dtype of the weights, so the weights
    are cast to autocast's dtype here.
    """
    device = x_TD.device.type
    experts = _CastExperts(self, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else self
    y_TD: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, x_TD, expert_TK, weight_TK)
    return y_TD


class _CastExperts:
    """An experts module whose weights are cast to another dtype; gradients flow back to the original weights."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts = experts
        for name, weight in experts.named_parameters(recurse=False):
            setattr(self, name, weight.to(dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


def _one_expert_forward(block: Any, hidden_states: Tensor) -> Tensor:
    experts = block.experts
    # Two linear layers on the halves of the weight: the backward pass concatenates their gradients, which have the size of the
    # weight. With one linear layer and a split output, it would concatenate gradients of the size of the activations.
    # squeeze(0) instead of [0], because the backward pass of [0] copies the gradient into a tensor of zeros.
    gate_FD, up_FD = experts.gate_up_proj.squeeze(0).chunk(2)
    gate, up = functional.linear(hidden_states, gate_FD), functional.linear(hidden_states, up_FD)
    y = functional.linear(experts.act_fn(gate) * up, experts.down_proj.squeeze(0))
    if isinstance(getattr(block, "shared_expert", None), nn.Module):
        y = y + torch.sigmoid(block.shared_expert_gate(hidden_states)) * block.shared_expert(hidden_states)
    return y


ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, sorted_experts)
