"""Faster forward passes for transformers models; classes, tensor names and results do not change.

In a sub-model with one expert per layer, the expert's weight does not depend on the token: a softmax over one number is
exactly 1. `specialise` makes such a model run as the dense model that it is.

Shapes: T tokens, K selected experts, S = T K selections, E experts, D hidden, F expert hidden, G = 2F.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moedisco_ray.core.families import Family
from moedisco_ray.models.expert_parallel import divided_experts, group_of
from moedisco_ray.models.hf import family_of, moe_blocks, routers

IMPLEMENTATION = "moedisco_sorted"
_NOISE = ("attention_dropout", "jitter_noise", "input_jitter_noise")
"""Attributes of transformers' modules that draw random numbers in training, from torch's global generator."""


def specialise(model: PreTrainedModel) -> PreTrainedModel:
    """Choose the fastest forward for each MoE block of a model, in place; return the model.

    A block with one expert skips its router. The router is frozen, because its gradient is zero and only weight decay
    would change it; the block records no router logits. Blocks with more experts use `sorted_experts`. Nothing is drawn
    at random in training, whatever the checkpoint's `config.json` says: there is no dropout and no jitter, and a router
    that samples runs as it does without training. So a training can be repeated and resumed exactly.
    """
    for module in model.modules():
        for name in _NOISE:
            if hasattr(module, name):
                setattr(module, name, 0.0)
    model.set_experts_implementation(IMPLEMENTATION)
    family, fields = family_of(model), model.config.to_dict()
    # one object, so that one compiled graph fits all layers
    forward = _OnlyExpert(family, family.router.scaling(fields)).forward
    is_constant = family.router.is_constant_alone(fields.get("norm_topk_prob"))
    for block, router in zip(moe_blocks(model).values(), routers(model).values(), strict=True):
        if is_constant and len(router.get_parameter("weight")) == 1:
            router.requires_grad_(requires_grad=False)
            block.forward = types.MethodType(forward, block)
        elif family.router.scores == "sparse_mixer":
            router.eval().train = types.MethodType(_stay, router)  # type: ignore[method-assign]
    return model


def _stay(router: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001 - as `nn.Module.train`
    return router


def runnable(model: PreTrainedModel) -> PreTrainedModel:
    """`specialise` a model that has fewer experts than its router can run with; return any other as it is."""
    needed = family_of(model).router.least_in_group
    few = any(len(router.get_parameter("weight")) < needed for router in routers(model).values())
    return specialise(model) if few else model


def sorted_experts(self: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """For each token, sum the weighted outputs of its selected experts; each expert runs once, on all its tokens.

    The result is deterministic. On a GPU, `grouped_experts` is called instead: the loop over experts would wait for the
    GPU.

    Args:
        self: The experts' module, with `gate_up_proj` w_EGD and `down_proj` w_EDF; or transposed, and with biases.
        x_TD: Input tokens.
        expert_TK: Indices of the selected experts.
        weight_TK: Weights of the selected experts.

    Returns:
        Output tokens y_TD.
    """
    group = group_of(self)
    if group is not None:
        return divided_experts(self, x_TD, expert_TK, weight_TK, group=group, compute=sorted_experts)
    if x_TD.is_cuda:
        return grouped_experts(self, x_TD, expert_TK, weight_TK)
    T, K = expert_TK.shape
    flat_S = expert_TK.reshape(-1)
    order_S = torch.argsort(flat_S, stable=True)
    counts = torch.bincount(flat_S, minlength=self.num_experts).tolist()
    pieces = torch.split(x_TD[order_S // K], counts)
    # The backward pass of unbind stacks the gradients of the experts once; that of indexing would add up E gradients of
    # the whole stack.
    stacks = (stack.unbind(0) for stack in _stacks(self))
    y_SD = (
        torch.cat([_expert(self, *each) for each in zip(pieces, *stacks, strict=True)])
        * weight_TK.reshape(-1)[order_S, None]
    )
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(T * K, device=order_S.device)
    return y_SD[inverse_S].view(T, K, x_TD.shape[1]).sum(dim=1).to(x_TD.dtype)


def grouped_experts(self: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Compute the same as `sorted_experts` with transformers' grouped matrix product: two kernels for all experts.

    The CPU does not wait for the GPU. The grouped product ignores autocast and computes in the dtype of the weights, so
    the weights are cast to autocast's dtype here.
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


def _stacks(experts: Any) -> list[Tensor]:
    stacks = [experts.gate_up_proj, experts.down_proj]
    return [*stacks, experts.gate_up_proj_bias, experts.down_proj_bias] if experts.has_bias else stacks


def _expert(
    experts: Any,
    x_SD: Tensor,
    up_GD: Tensor,
    down_DF: Tensor,
    up_bias_G: Tensor | None = None,
    down_bias_D: Tensor | None = None,
) -> Tensor:
    down_DF = down_DF.mT if experts.is_transposed else down_DF
    return functional.linear(_hidden(experts, x_SD, up_GD, up_bias_G), down_DF, down_bias_D)


def _hidden(experts: Any, x_SD: Tensor, up_GD: Tensor, up_bias_G: Tensor | None) -> Tensor:
    up_GD = up_GD.mT if experts.is_transposed else up_GD
    found_SF: Tensor = experts._apply_gate(functional.linear(x_SD, up_GD, up_bias_G))  # noqa: SLF001 - transformers' own gate of the family
    return found_SF


def expert_hidden(experts: Any, expert: int, x_SD: Tensor) -> Tensor:
    """Hidden activations of an expert [S, F], the inputs of its down projection.

    Args:
        experts: The experts' module, as in `sorted_experts`.
        expert: Number of the expert.
        x_SD: Input tokens.
    """
    return _hidden(
        experts, x_SD, experts.gate_up_proj[expert], experts.gate_up_proj_bias[expert] if experts.has_bias else None
    )


@dataclasses.dataclass(frozen=True)
class _OnlyExpert:
    """The MoE block of a family whose layers have one expert.

    Attributes:
        family: The family.
        weight: The expert's weight.
    """

    family: Family
    weight: float

    def forward(self, block: Any, hidden_states: Tensor) -> Any:
        experts, shared = block.experts, self.family.shared
        # squeeze(0) instead of [0], because the backward pass of [0] copies the gradient into a tensor of zeros.
        if experts.is_transposed or experts.has_bias:
            y = _expert(experts, hidden_states, *(stack.squeeze(0) for stack in _stacks(experts)))
        else:
            # Two linear layers on the halves of the weight: the backward pass concatenates their gradients, which have
            # the size of the weight. With one linear layer and a split output, it would concatenate gradients of the
            # size of the activations.
            gate_FD, up_FD = experts.gate_up_proj.squeeze(0).chunk(2)
            gate, up = functional.linear(hidden_states, gate_FD), functional.linear(hidden_states, up_FD)
            y = functional.linear(experts.act_fn(gate) * up, experts.down_proj.squeeze(0))
        if self.weight != 1.0:
            y = y * self.weight
        if shared is not None and getattr(block, shared.module) is not None:
            found = getattr(block, shared.module)(hidden_states)
            y = y + (
                found if shared.gate is None else torch.sigmoid(getattr(block, shared.gate)(hidden_states)) * found
            )
        return (y, None) if self.family.returns_scores else y


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, sorted_experts)
