"""Faster forwards for transformers' own models; classes, keys and results stay theirs.

A sub-model with one expert per layer is a dense model in MoE clothes: its router's weight is a softmax over one number,
exactly 1. `specialise` makes it run as one.

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
    """Choose the fastest forward for each MoE block of a model, in place.

    A block with one expert skips its router, which is frozen: its gradient is exactly zero, so that weight decay alone
    would move it. Such a block records no router logits. Blocks with more experts use `sorted_experts`.

    Returns:
        The same model.
    """
    model.set_experts_implementation(_IMPLEMENTATION)
    for block in moe_blocks(model).values():
        router: Any = block.get_submodule("gate")
        if router.weight.shape[0] == 1:
            router.weight.requires_grad_(requires_grad=False)
            block.forward = types.MethodType(_one_expert_forward, block)
    return model


def sorted_experts(self: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Experts' weighted output: tokens sorted by expert, one plain linear per expert, no atomics, so deterministic.

    On a GPU, where its loop over experts would wait for the device, it hands over to transformers' `grouped_mm`;
    not under autocast, which `grouped_mm` does not know: it would compute in the weights' fp32.

    Args:
        self: The experts' module, with w_EGD `gate_up_proj` and w_EDF `down_proj`.
        x_TD: Tokens.
        expert_TK: Selected experts.
        weight_TK: Their weights.

    Returns:
        y_TD.
    """
    if x_TD.is_cuda and not torch.is_autocast_enabled("cuda"):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, x_TD, expert_TK, weight_TK)
    T, K = expert_TK.shape
    flat_S = expert_TK.reshape(-1)
    order_S = torch.argsort(flat_S, stable=True)
    counts = torch.bincount(flat_S, minlength=self.num_experts).tolist()
    pieces = torch.split(x_TD[order_S // K], counts)
    outputs = []
    # unbind, not indexing: the experts' gradients are stacked once, not added up in E copies of the whole stack.
    for piece_SD, w_GD, w_DF in zip(pieces, self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True):
        gate_SF, up_SF = functional.linear(piece_SD, w_GD).chunk(2, dim=-1)
        outputs.append(functional.linear(self.act_fn(gate_SF) * up_SF, w_DF))
    y_SD = torch.cat(outputs) * weight_TK.reshape(-1)[order_S, None]
    back_S = torch.empty_like(order_S)
    back_S[order_S] = torch.arange(T * K, device=order_S.device)
    return y_SD[back_S].view(T, K, -1).sum(dim=1).to(x_TD.dtype)


def _one_expert_forward(block: Any, hidden_states: Tensor) -> Tensor:
    experts = block.experts
    # Two linears on the halves of the weight, not one that is split afterwards: the backward pass then joins gradients
    # of the weight's size, not of the activations'. And squeeze, not [0], whose gradient is a zeroed copy of the stack.
    gate_FD, up_FD = experts.gate_up_proj.squeeze(0).chunk(2)
    gate, up = functional.linear(hidden_states, gate_FD), functional.linear(hidden_states, up_FD)
    y = functional.linear(experts.act_fn(gate) * up, experts.down_proj.squeeze(0))
    if isinstance(getattr(block, "shared_expert", None), nn.Module):
        y = y + torch.sigmoid(block.shared_expert_gate(hidden_states)) * block.shared_expert(hidden_states)
    return y


ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, sorted_experts)
