"""Run many batches through a model of any size, one decoder layer after the other: its weights are read once for all batches.

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

from moedisco_ray.models.streamed import device_of_model, loaded, stays

_CPU_STATES, _GPU_STATES = 2**29, 2**32
"""Maximum size of the hidden states that pass through the layers together (bytes). Larger groups load the weights less often."""

T = TypeVar("T")


class Step(Protocol):
    """A decoder layer as a function."""

    def __call__(self, hidden_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """The layer's output for hidden states, with an attention mask; None: every position is real."""


def final_states(
    model: PreTrainedModel, inputs: Iterable[Tensor], *, masks: Sequence[Tensor | None] | None = None,
    before: Callable[[int], None] | None = None, after: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """The last hidden state of every batch.

    If the model is streamed and does not stay in memory, all batches pass through a layer before the next layer is loaded; the
    hidden states of all batches are in memory then, see `grouped`.

    Args:
        model: A model, streamed or in memory.
        inputs: Token ids [B, L] of each batch, on the model's device.
        masks: Attention mask [B, L] of each batch; None: every position is real.
        before: Receives the number of a batch before layers run on it.
        after: Receives the number of a batch and how many layers have run on it since the last call.

    Yields:
        Hidden states [B, L, D] of each batch in turn.
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
    """One decoder layer as a function of hidden states.

    transformers' own forward pass of the whole model calls it, with all other layers left out, so attention mask and position
    embeddings are those that transformers computes for the family.
    """
    base: Any = model.base_model
    alone = copy.copy(base)
    alone._modules = dict(base._modules)    # noqa: SLF001 - `copy` shares the dictionary of the model itself
    alone.norm = nn.Identity()
    alone.layers = nn.ModuleList([layer if i == index else _LeftOut() for i, layer in enumerate(base.layers)])

    def step(hidden_BLD: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        found: Tensor = alone(inputs_embeds=hidden_BLD, attention_mask=mask_BL, use_cache=False).last_hidden_state
        return found

    return step


def grouped(items: Iterable[T], positions: Callable[[T], int], model: PreTrainedModel) -> Iterator[list[T]]:
    """Cut batches into groups whose hidden states fit in memory together; a group is at least one batch.

    Args:
        items: The batches.
        positions: Returns the number of positions of a batch, padding included.
        model: The model that they pass through.
    """
    limit = _GPU_STATES if device_of_model(model).type == "cuda" else _CPU_STATES
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
    """Calls the observers of `final_states` around a run of layers."""

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
    """A decoder layer that returns its input."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states
