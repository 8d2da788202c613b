"""Run many batches through a model of any size, layer by layer, so that its weights are read once for all batches.

Shapes: B sequences, L positions, D hidden.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from moedisco_ray.core.limits import CPU_STATES, GPU_STATES
from moedisco_ray.models.hf import family_of
from moedisco_ray.models.streamed import device_of_model, loaded, stays

T = TypeVar("T")


class Step(Protocol):
    """A decoder layer as a function of hidden states."""

    def __call__(self, hidden_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Run the layer. The attention mask is 0 at padding, and None without padding."""


def final_states(
    model: PreTrainedModel,
    inputs: Iterable[Tensor],
    *,
    masks: Sequence[Tensor | None] | None = None,
    before: Callable[[int], None] | None = None,
    after: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Compute the last hidden states of every batch.

    If the model is streamed and its weights do not stay in memory, all batches pass through a layer before the next
    layer is loaded. Then the hidden states of all batches are in memory at the same time; `grouped` divides batches so
    that they fit.

    Args:
        model: A model, streamed or in memory.
        inputs: Token ids [B, L] of each batch, on the model's device.
        masks: Attention mask [B, L] of each batch, 0 at padding; None for a batch without padding.
        before: Receives the index of a batch before layers run on it.
        after: Receives the index of a batch, and the number of layers that have run on it since the last call.

    Yields:
        Hidden states [B, L, D] of each batch, in the order of `inputs`.
    """
    base: Any = model.base_model
    run = _Observed(before, after)
    if all(stays(layer) for layer in base.layers):
        for number, tokens_BL in enumerate(inputs):
            with run.on(number, len(base.layers)):
                hidden_BLD = base(tokens_BL, attention_mask=_mask(masks, number), use_cache=False).last_hidden_state
            yield hidden_BLD
        return
    states = [base.embed_tokens(tokens_BL) for tokens_BL in inputs]
    for index, layer in enumerate(base.layers):
        step = layer_step(model, index)
        with loaded(layer):
            for number, hidden_BLD in enumerate(states):
                with run.on(number, 1):
                    states[number] = step(hidden_BLD, _mask(masks, number))
    states.reverse()
    while states:
        yield base.norm(states.pop())


def layer_step(model: PreTrainedModel, index: int) -> Step:
    """One decoder layer as a function of hidden states."""
    alone = layer_alone(model, index)

    def step(hidden_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        found: Tensor = alone(inputs_embeds=hidden_BLD, attention_mask=mask_BL, use_cache=False).last_hidden_state
        return found

    return step


def layer_alone(model: PreTrainedModel, index: int) -> nn.Module:
    """A copy of transformers' base model that shares one decoder layer, in which all other layers return their input.

    So transformers computes the attention mask and the position embeddings as for the whole model. The copy has neither
    a last norm nor weights other than the layer's, whose names begin with `layers.INDEX.`.
    """
    base: Any = model.base_model
    alone = copy.copy(base)
    alone._modules = dict(base._modules)  # noqa: SLF001 - `copy` shares the dictionary of the model itself
    alone.norm = nn.Identity()
    factor = family_of(model).embedding_factor
    if factor is not None and index:  # only the inputs of the first layer are embeddings
        setattr(alone, factor, 1.0)
    alone.layers = nn.ModuleList([layer if i == index else _LeftOut() for i, layer in enumerate(base.layers)])
    return alone


def grouped(items: Iterable[T], positions: Callable[[T], int], model: PreTrainedModel) -> Iterator[list[T]]:
    """Divide batches into groups whose hidden states fit in memory at the same time; each group has at least one batch.

    Args:
        items: The batches.
        positions: Returns the number of positions of a batch, padding included.
        model: The model that the batches pass through.
    """
    limit = GPU_STATES if device_of_model(model).type == "cuda" else CPU_STATES
    each = int(model.config.hidden_size) * model.dtype.itemsize
    group: list[T] = []
    size = 0
    for item in items:
        added = positions(item) * each
        if group and size + added > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += added
    if group:
        yield group


@dataclasses.dataclass(frozen=True)
class _Observed:
    """Calls the `before` and `after` of `final_states` each time that layers run on a batch."""

    before: Callable[[int], None] | None
    after: Callable[[int, int], None] | None

    @contextlib.contextmanager
    def on(self, number: int, layers: int) -> Iterator[None]:
        if self.before is not None:
            self.before(number)
        yield
        if self.after is not None:
            self.after(number, layers)


def _mask(masks: Sequence[Tensor | None] | None, number: int) -> Tensor | None:
    return None if masks is None else masks[number]


class _LeftOut(nn.Module):
    """Replaces a decoder layer and returns its input."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states
