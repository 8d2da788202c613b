"""Temporary memory of a worker of a sharded training (FSDP2), next to its shares of weights, gradients and optimizer state.

FSDP gathers the weights of one layer at a time, and those of embedding and head for the whole step. While the backward pass is at a
layer, a worker holds, with s bytes per element of a matrix product:

* the layer's weights s, its gradients s, and the weights s of the next layer, which are gathered ahead: 3s bytes per parameter;
* a copy of the gradients in fp32, which is reduced, after the layer's activations are freed: 4 bytes per parameter. In this copy
  and in gathered weights, every worker has as many experts as the one with most;
* embedding and head, s bytes per parameter, and the gradient of the head, or of an embedding that is the head too, s.

The peak is at the first layer of the backward pass, when all activations exist; or when this layer's gradients are reduced; or at
the last layer, when all reduced gradients exist; or when the gradients of embedding and head are reduced, last of all.

If workers exchange weights and gradients once per step, a worker holds all weights, s bytes per parameter. With several
micro-batches, it also holds all gradients in fp32, and reduced gradients replace them layer by layer.

If experts are divided among workers, only the worker's own experts count. `tests/unit/test_fake_gang_memory.py` compares all this
with steps of published checkpoints.
"""

from __future__ import annotations

import dataclasses

_REDUCED = 4
"""Bytes of a gradient in fp32, in which gradients are added up and reduced."""


@dataclasses.dataclass(frozen=True)
class Gathered:
    """Numbers of parameters that a worker gathers.

    Attributes:
        layer: The largest layer.
        padded_layer: The largest layer, if every worker had the largest share of its experts.
        outside: Embedding, head and last norm.
        head: The head, or the embedding if they are tied.
        whole: All of the model but other workers' experts.
        padded_whole: The same, if every worker had the largest share of the experts.
    """

    layer: int
    padded_layer: int
    outside: int
    head: int
    whole: int
    padded_whole: int


@dataclasses.dataclass(frozen=True)
class Moment:
    """Bytes that a worker holds at one moment of the backward pass, next to weights and optimizer state.

    Attributes:
        gradients: Reduced gradients.
        activations: Saved activations, with logits.
        copies: Gathered weights, gradients that are not reduced, and their copies.
    """

    gradients: int
    activations: int
    copies: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.gradients + self.activations + self.copies


def peak(
    gathered: Gathered, width: int, *, gradients: int, activations: int, layer_activations: int, once_per_step: bool,
    is_only_pass: bool,
) -> Moment:
    """The moment of the backward pass at which a worker needs most memory.

    Args:
        gathered: Parameters that the worker gathers.
        width: Bytes of an element in a matrix product.
        gradients: Bytes of the worker's share of all gradients.
        activations: Bytes of all activations of a micro-batch.
        layer_activations: Bytes of the activations of one layer.
        once_per_step: Whether weights and gradients are exchanged once per step, instead of once per micro-batch.
        is_only_pass: Whether a step has one micro-batch.
    """
    later = activations - layer_activations
    if once_per_step:
        sums = 0 if is_only_pass else _REDUCED
        held = width * (gathered.padded_whole + gathered.head) + sums * gathered.whole
        new = width * gathered.layer
        reducing = (_REDUCED - width) * gathered.padded_layer + (new if is_only_pass else 0)    # the layer's weights are freed
        return max(
            Moment(0, activations, held + new), Moment(0, later, held + reducing), key=lambda moment: moment.total)
    held = width * (gathered.outside + gathered.head)
    at_layer = held + 2 * width * gathered.padded_layer + width * gathered.layer
    before, reducing = 0 if is_only_pass else gradients, at_layer + _REDUCED * gathered.padded_layer
    return max(
        Moment(before, activations, at_layer), Moment(before, later, reducing),
        Moment(gradients, 0, reducing), Moment(gradients, 0, (2 * width + _REDUCED) * gathered.outside),
        key=lambda moment: moment.total)
