"""Faster forward passes for transformers models; classes, tensor names and results do not change.

In a sub-model with one expert per layer, the expert's weight does not depend on the token: a softmax over one number is
exactly 1. `specialise` makes such a model run as the dense model that it is.

Shapes: T tokens, K selected experts, S = T K selections, E experts, D hidden, F expert hidden, G = 2F.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moedisco_ray.core.families import Family
from moedisco_ray.models.expert_parallel import divided_experts, group_of
from moedisco_ray.models.grouped import Rows, grouped_product
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
        if is_constant and len(router.get_parameter(family.router.weight)) == 1:
            router.requires_grad_(requires_grad=False)
            block.forward = types.MethodType(forward, block)
        elif family.router.scores == "sparse_mixer":
            router.eval().train = types.MethodType(_stay, router)  # type: ignore[method-assign]
    return model


def _stay(router: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001 - as `nn.Module.train`
    return router


def runnable(model: PreTrainedModel) -> PreTrainedModel:
    """`specialise` a model that has fewer experts than its router can run with; return any other as it is."""
    kind = family_of(model).router
    few = any(len(router.get_parameter(kind.weight)) < kind.least_in_group for router in routers(model).values())
    return specialise(model) if few else model


def sorted_experts(
    self: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, counts: Sequence[int] | None = None
) -> Tensor:
    """For each token, sum the weighted outputs of its selected experts; each expert runs once, on all its tokens.

    The result is deterministic. On a GPU, `grouped_experts` is called instead: the loop over experts would start many
    more kernels.

    Args:
        self: The experts' module, with `gate_up_proj` w_EGD and `down_proj` w_EDF; or transposed, and with biases.
        x_TD: Input tokens.
        expert_TK: Indices of the selected experts.
        weight_TK: Weights of the selected experts.
        counts: How often each expert is selected; None: it is counted.

    Returns:
        Output tokens y_TD.
    """
    group = group_of(self)
    if group is not None:
        return divided_experts(self, x_TD, expert_TK, weight_TK, group=group, compute=sorted_experts)
    if x_TD.is_cuda:
        return grouped_experts(self, x_TD, expert_TK, weight_TK, counts)
    selected = _Selected(self, expert_TK, counts)
    pieces = torch.split(selected.of(x_TD), selected.rows.counts)
    # The backward pass of unbind stacks the gradients of the experts once; that of indexing would add up E gradients of
    # the whole stack.
    stacks = (stack.unbind(0) for stack in _stacks(self))
    y_SD = torch.cat([_expert(self, *each) for each in zip(pieces, *stacks, strict=True)])
    return selected.summed(y_SD, weight_TK).to(x_TD.dtype)


def grouped_experts(
    self: Any, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, counts: Sequence[int] | None = None
) -> Tensor:
    """Compute the same as `sorted_experts` with two products of all experts, as transformers does.

    Where torch has a kernel for such products, the CPU does not wait for the GPU; elsewhere it waits once. Outside of
    training, transformers' own function computes them, whose memory plans of evaluations count. The forward pass of
    streamed training has no gradients, but is computed again with them, by the same operations.
    """
    if not torch.is_grad_enabled() and not self.training:
        autocasts = torch.is_autocast_enabled(x_TD.device.type)
        experts = _CastExperts(self, torch.get_autocast_dtype(x_TD.device.type)) if autocasts else self
        y_TD: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, x_TD, expert_TK, weight_TK)
        return y_TD
    selected = _Selected(self, expert_TK, counts)
    x_SD, biases = selected.of(x_TD), ("gate_up_proj_bias", "down_proj_bias") if self.has_bias else (None, None)
    hidden_SF = self._apply_gate(selected.multiplied(self, x_SD, "gate_up_proj", biases[0]))
    y_SD = selected.multiplied(self, hidden_SF, "down_proj", biases[1])
    return selected.summed(y_SD, weight_TK).to(x_TD.dtype)


class _CastExperts:
    """An experts module whose weights are cast to another dtype."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts = experts
        for name, weight in experts.named_parameters(recurse=False):
            setattr(self, name, weight.to(dtype))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


class _Selected:
    """The tokens of each expert, one expert after the other.

    Attributes:
        rows: Which tokens belong to which expert.
    """

    def __init__(self, experts: Any, expert_TK: Tensor, counts: Sequence[int] | None) -> None:
        self._shape = expert_TK.shape
        self._expert_S, self._order_S = torch.sort(expert_TK.reshape(-1), stable=True)
        self.rows = Rows(self._expert_S, experts.num_experts, counts)

    def of(self, x_TD: Tensor) -> Tensor:
        """The tokens, once for each of their experts, x_SD."""
        return x_TD[self._order_S // self._shape[1]]

    def multiplied(self, experts: Any, x_SA: Tensor, stack: str, bias: str | None) -> Tensor:
        """Products of the tokens with a matrix of their expert, and its bias."""
        matrices: Tensor = getattr(experts, stack)  # once, because adapters compute it
        y_SB = grouped_product(x_SA, matrices if experts.is_transposed else matrices.mT, self.rows)
        return y_SB if bias is None else y_SB + getattr(experts, bias).to(y_SB.dtype)[self._expert_S]

    def summed(self, y_SD: Tensor, weight_TK: Tensor) -> Tensor:
        """Weighted sum of the outputs of a token's experts, y_TD."""
        T, K = self._shape
        y_SD = y_SD * weight_TK.reshape(-1)[self._order_S, None]
        inverse_S = torch.empty_like(self._order_S)
        inverse_S[self._order_S] = torch.arange(T * K, device=self._order_S.device)
        return y_SD[inverse_S].view(T, K, y_SD.shape[1]).sum(dim=1)


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
    x_SG = functional.linear(x_SD, up_GD, up_bias_G)
    found_SF: Tensor = experts._apply_gate(x_SG)  # noqa: SLF001 - transformers' own gate of the family
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
