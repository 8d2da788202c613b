"""The parts of a model that come to a device one after the other, and what a step of streamed training has in hand.

Axes: B sequences of a micro-batch, L positions, T = B L tokens, N routers, E experts, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import queue
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moedisco_ray.models import head_inputs
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.cross_entropy import summed_cross_entropy
from moedisco_ray.training.streamed_cards import Handover


@dataclasses.dataclass
class Step:
    """A step on its way.

    Attributes:
        micros: The micro-batches, on each card.
        fractions: How often each expert was selected in the last step, per token, on each card.
        states: Hands on the inputs of each part.
        gradients: Hands on their gradients.
        losses: Loss of each micro-batch, summed.
        selections: How often each expert of a layer is selected.
        norms: Norm of each gradient.
        end_parts: The cards that have a part of the gradient of the last part's weights.
        ended: For each card, the end of the copy of its part to the host.
    """

    micros: Sequence[Sequence[MicroBatch]]
    fractions: Sequence[Tensor]
    states: Handover
    gradients: Handover
    losses: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    selections: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    norms: dict[nn.Parameter, Tensor] = dataclasses.field(default_factory=dict)
    end_parts: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    ended: queue.SimpleQueue[torch.cuda.Event | None] = dataclasses.field(default_factory=queue.SimpleQueue)


class Part:
    """A part of a model whose weights come to the device together.

    Attributes:
        module: Computes the part, by the names of `tensors`.
        tensors: Parameters and buffers in the host's memory.
        parameters: Those that are parameters.
    """

    def __init__(self, module: Any, prefix: str) -> None:
        self.module = module
        self.parameters = {name: each for name, each in module.named_parameters() if name.startswith(prefix)}
        buffers = {name: each for name, each in module.named_buffers() if name.startswith(prefix)}
        self.tensors: dict[str, Tensor] = {**self.parameters, **buffers}

    @property
    def trains(self) -> bool:
        """Whether a weight of the part trains."""
        return any(each.requires_grad for each in self.parameters.values())

    def leaves(self, near: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let the copies of the weights that train get gradients; return all copies."""
        for name, parameter in self.parameters.items():
            near[name].requires_grad_(parameter.requires_grad)
        return near


class End(nn.Module):
    """The last norm, the head and the loss of a model.

    Its modules are its own, because `functional_call` changes them during the call, and several cards call it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        base: Any = model.base_model
        self.norm, self.head = _sharing(base.norm), _sharing(model.get_output_embeddings())
        self._whole = (model,)  # a tuple, because a module would be a part of this one

    def forward(self, hidden_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        hidden_TD = head_inputs(self._whole[0], self.norm(hidden_BLD).flatten(0, 1))
        head: Any = self.head
        return summed_cross_entropy(hidden_TD, head.weight, targets_BL.flatten(), head.bias)


def _sharing(module: nn.Module) -> nn.Module:
    """A module with the same parameters."""
    other = copy.copy(module)
    other._parameters = dict(module._parameters)  # noqa: SLF001 - `copy` shares the dictionary of the module itself
    return other


def gradient_of(leaf: Tensor) -> Tensor:
    """The gradient of a layer's inputs."""
    if leaf.grad is None:
        raise ValueError("the loss does not depend on a layer's inputs")
    return leaf.grad


def on_device(micros: Sequence[MicroBatch], device: torch.device) -> list[MicroBatch]:
    """Micro-batches on a device."""
    moved = []
    for micro in micros:
        found = {field.name: getattr(micro, field.name) for field in dataclasses.fields(micro)}
        tensors: dict[str, Any] = {name: each.to(device) for name, each in found.items() if isinstance(each, Tensor)}
        moved.append(dataclasses.replace(micro, **tensors))
    return moved
