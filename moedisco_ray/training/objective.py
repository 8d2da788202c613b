"""The training objective: next-token cross-entropy, plus a load-balance loss and a z-loss of the routers.

Every term except the load-balance loss is a sum over tokens, divided by the number of tokens of the *global* batch. So
the terms of micro-batches and workers add up, and the result does not depend on how the batch is divided among them, up
to rounding. Of chat data, the cross-entropy counts the assistant's tokens only, in the sum and in the number; routers
are measured on all tokens.

The load-balance loss is f P, a product of two means over the global batch (see `load_balance_loss`). P carries the
gradient. f is a constant, taken from the *previous* global batch: it is exact, known before the first micro-batch, and
the same on every worker. So the load-balance losses of micro-batches and workers add up too. f is part of a checkpoint.

Axes: B sequences, L positions, T = B L tokens, N routers (MoE layers), E experts, K top-k.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moedisco_ray.models import family_of, probabilities, routers

DEAD_LOAD = 0.01
"""Load below which an expert counts as dead, as a multiple of the balanced load. The literature has no common
threshold."""


@dataclasses.dataclass(frozen=True)
class RouterSums:
    """Sums over the tokens of one forward pass.

    Attributes:
        probabilities_NE: Sum of the router's probabilities (`models.routing`); has a gradient.
        log_partition_N: Sum of logsumexp(logits)^2; has a gradient.
        selections_NE: Number of times each expert was among the top K.
    """

    probabilities_NE: Tensor
    log_partition_N: Tensor
    selections_NE: Tensor


class RouterProbe:
    """Records sums over the routers' outputs with forward hooks.

    Layers with one expert are ignored, because they need no load balancing.

    Attributes:
        layers: Number of routers with more than one expert, N.
        rows: Number of each of these routers, from 0 to N - 1, by the index of its decoder layer.
        experts: Number of experts, E; 0 without such routers.
        top_k: Selected experts per token, K; 0 without such routers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        every: dict[int, Any] = routers(model)
        layers = [index for index, module in every.items() if module.num_experts > 1]
        found = [every[index] for index in layers]
        self.rows = {index: n for n, index in enumerate(layers)}
        kind = family_of(model).router
        self.layers = len(found)
        self.experts: int = found[0].num_experts if found else 0
        self.top_k: int = found[0].top_k if found else 0
        self._recorders = {index: _Recorder(kind, self.experts) for index in layers}
        for module, recorder in zip(found, self._recorders.values(), strict=True):
            module.register_forward_hook(recorder)

    @contextlib.contextmanager
    def recording(self, weights_T: Tensor | None = None, *, layer: int | None = None) -> Iterator[None]:
        """Sum the routers' statistics over the tokens of the forward pass inside the `with` block.

        Args:
            weights_T: Weight of each token; by default, all weights are equal.
            layer: The one layer that the forward pass runs; None: all. Threads may run different layers.
        """
        chosen = self._of(layer)
        for recorder in chosen:
            recorder.sums, recorder.weights_T, recorder.is_recording = None, weights_T, True
        try:
            yield
        finally:
            for recorder in chosen:
                recorder.is_recording = False

    def sums(self, layer: int | None = None) -> RouterSums:
        """Sums over the tokens of the last recorded forward pass, from which the routers' losses are computed."""
        chosen = self._of(layer)
        found = [each.sums for each in chosen if each.sums is not None]
        for recorder in chosen:
            recorder.sums = None
        probabilities, log_partition, selections = zip(*found, strict=True)
        return RouterSums(torch.stack(probabilities), torch.stack(log_partition), torch.stack(selections))

    def _of(self, layer: int | None) -> list[_Recorder]:
        return list(self._recorders.values()) if layer is None else [self._recorders[layer]]


class _Recorder:
    """Sums over the outputs of one router, as its forward hook.

    Attributes:
        weights_T: Weight of each token; None: all are equal.
        is_recording: Whether the result counts.
        sums: Those of `RouterSums`, of the last recorded forward pass.
    """

    def __init__(self, kind: Any, experts: int) -> None:
        self.weights_T: Tensor | None = None
        self.is_recording = False
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._kind, self._experts = kind, experts

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        del module, inputs
        if not self.is_recording and not torch.is_grad_enabled():
            return  # an evaluation, whose tokens the weights are not of
        logits_TE, _, indices_TK = output
        logits_TE = logits_TE.float()
        weights_T = self.weights_T
        # Activation checkpointing runs the layer, and so this hook, again in the backward pass. The hook must then
        # perform the same operations, because saved tensors are matched by order; only its result is dropped.
        squared_T = torch.logsumexp(logits_TE, dim=-1).square()
        probabilities_TE = probabilities(logits_TE, self._kind)
        if weights_T is None:
            sums = probabilities_TE.sum(dim=0), squared_T.sum()
        else:
            sums = weights_T @ probabilities_TE, weights_T @ squared_T
        if self.is_recording:
            self.sums = (*sums, _selections(indices_TK, weights_T, self._experts))


def load_balance_loss(probabilities_NE: Tensor, fractions_NE: Tensor, tokens: int, layers: int | None = None) -> Tensor:
    """E sum_e f_e P_e, averaged over the layers (Fedus et al. 2021, Switch Transformer, equations 4 to 6).

    P_e is the mean probability of expert e, and f_e the number of its selections per token, so that f sums to K, as in
    transformers: balanced routers have a loss of K. Each layer is balanced on its own, as in OLMoE's training code.
    (transformers averages f and P over the layers first, so that opposite imbalances of two layers cancel.)

    Args:
        probabilities_NE: Sum of the router's probabilities over some or all tokens of the global batch.
        fractions_NE: Number of selections of each expert per token, f.
        tokens: Tokens of the global batch.
        layers: Number of all layers, if these are only some of them; the losses of all layers then add up.
    """
    count, experts = fractions_NE.shape
    return (fractions_NE * probabilities_NE).sum() * (experts / ((layers or count) * tokens))


def z_loss(log_partition_N: Tensor, tokens: int, layers: int | None = None) -> Tensor:
    """Mean of logsumexp(logits)^2 over tokens and layers (Zoph et al. 2022, ST-MoE, equation 5).

    Args:
        log_partition_N: Sum of logsumexp(logits)^2 over some or all tokens of the global batch.
        tokens: Tokens of the global batch.
        layers: Number of all layers, if these are only some of them.
    """
    return log_partition_N.sum() / ((layers or len(log_partition_N)) * tokens)


def uniform_fractions(layers: int, experts: int, top_k: int) -> Tensor:
    """Selections of each expert per token [N, E] with perfectly balanced routers, assumed before the first batch."""
    return torch.full((layers, experts), top_k / experts)


def expert_balance(fractions_NE: Tensor) -> dict[str, float]:
    """How evenly the routers use their experts, as figures of a progress event; empty without routers.

    Args:
        fractions_NE: Number of selections of each expert per token, f.

    Returns:
        `largest_load`: the largest load of an expert in any layer, as a multiple of the balanced load, 1 / E of the
        selections. `dead_experts`: number of experts of all layers whose load is below `DEAD_LOAD`.
    """
    if not fractions_NE.numel():
        return {}
    load_NE = fractions_NE / fractions_NE.mean(dim=1, keepdim=True)
    largest, dead = torch.stack([load_NE.max(), (load_NE < DEAD_LOAD).sum()]).tolist()  # one read from the GPU
    return {"largest_load": largest, "dead_experts": int(dead)}


@torch.no_grad()
def _selections(indices_TK: Tensor, weights_T: Tensor | None, experts: int) -> Tensor:
    # Sums of integers below 2^24 are exact in fp32, so the order of a scatter on a GPU does not matter.
    ones_T = torch.ones(len(indices_TK), device=indices_TK.device) if weights_T is None else weights_T
    counts_E = torch.zeros(experts, device=indices_TK.device)
    return counts_E.scatter_add_(0, indices_TK.flatten(), ones_T.repeat_interleave(indices_TK.shape[1]))
