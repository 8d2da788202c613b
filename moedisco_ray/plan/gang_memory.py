"""Temporary memory of a worker of an FSDP2 training, next to its shares of weights, gradients and optimizer state.

FSDP gathers the weights of one layer at a time, and those of embedding and head for the whole step. While the backward
pass is at a layer, a worker holds, with s bytes per element of a matrix product:

* the layer's weights s, its gradients s, and the weights s of the next layer, which are gathered ahead: 3s bytes per
  parameter;
* a copy of the gradients in fp32, which is reduced, after the layer's activations are freed: 4 bytes per parameter. In
  this copy and in gathered weights, every worker has as many experts as the one with most;
* embedding and head, s bytes per parameter, and the gradient of the head, or of an embedding that is the head too, s.

The peak is at the first layer of the backward pass, when all activations exist; or when this layer's gradients are
reduced; or at the last layer, when all reduced gradients exist; or when the gradients of embedding and head are
reduced, last of all, when all gathered weights are free.

If workers exchange weights and gradients once per step, a worker holds all weights, s bytes per parameter. With several
micro-batches, it also holds all gradients in fp32, and reduced gradients replace them layer by layer.

With replicas, each reduced gradient is kept in fp32 too until the backward pass ends, because it travels between the
replicas.

If experts are divided among workers, only the worker's own experts count. `tests/unit/test_fake_gang_memory.py`
compares all this with steps of published checkpoints.
"""

from __future__ import annotations

import dataclasses

from moedisco_ray.core.config import Architecture
from moedisco_ray.core.families import DECLARATIONS, FamilyName
from moedisco_ray.plan.parameters import Parameters
from moedisco_ray.policies.parallel import Layout

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


def largest_share(parameters: Parameters, architecture: Architecture, layout: Layout) -> int:
    """Parameters that the worker with the largest share stores."""
    experts = round(parameters.experts * _padding(architecture, layout))
    return -(-(parameters.total - parameters.experts + experts) // layout.shards)


def gathered(family: FamilyName, architecture: Architecture, parameters: Parameters, layout: Layout) -> Gathered:
    """Parameters that a worker of a layout gathers."""
    layers, dense_layers = architecture.num_hidden_layers, DECLARATIONS[family].dense_layers(architecture.fields)
    own = parameters.experts // layout.expert
    shared = (parameters.attention + parameters.norms) // layers + parameters.above_mean
    dense = parameters.dense // dense_layers if dense_layers else 0

    def layer(experts: int) -> int:
        return shared + max(
            dense, (parameters.router + parameters.shared_expert + experts) // max(1, layers - dense_layers)
        )

    padded = round(own * _padding(architecture, layout))
    whole = parameters.total - parameters.experts
    return Gathered(
        layer=layer(own),
        padded_layer=layer(padded),
        outside=parameters.embedding + parameters.head + architecture.hidden_size,
        head=max(parameters.head, parameters.embedding),
        whole=whole + own,
        padded_whole=whole + padded,
    )


def peak(
    parts: Gathered,
    width: int,
    *,
    gradients: int,
    kept: int,
    activations: int,
    layer_activations: int,
    once_per_step: bool,
    is_only_pass: bool,
) -> Moment:
    """The moment of the backward pass at which a worker needs most memory.

    Args:
        parts: Parameters that the worker gathers.
        width: Bytes of an element in a matrix product.
        gradients: Bytes of the worker's share of all gradients.
        kept: Parameters whose reduced gradients are kept in fp32, too: the worker's share if there are replicas, else
            0.
        activations: Bytes of all activations of a micro-batch.
        layer_activations: Bytes of the activations of one layer.
        once_per_step: Whether weights and gradients are exchanged once per step, instead of once per micro-batch.
        is_only_pass: Whether a step has one micro-batch.
    """
    later, last = activations - layer_activations, _REDUCED * kept
    if once_per_step:
        sums = 0 if is_only_pass else _REDUCED
        held = width * (parts.padded_whole + parts.head) + sums * parts.whole
        new = width * parts.layer
        # the layer's weights are freed
        reducing = (_REDUCED - width) * parts.padded_layer + (new if is_only_pass else 0)
        at_end = last + width * (parts.outside + parts.head) + (width + _REDUCED) * parts.padded_layer
        return max(
            Moment(0, activations, held + new),
            Moment(0, later, held + reducing),
            Moment(gradients, 0, at_end),
            key=lambda moment: moment.total,
        )
    held = width * (parts.outside + parts.head)
    at_layer = held + 2 * width * parts.padded_layer + width * parts.layer
    before, reducing = 0 if is_only_pass else gradients, at_layer + _REDUCED * parts.padded_layer
    return max(
        Moment(before, activations, at_layer),
        Moment(before, later, reducing),
        Moment(gradients, 0, last + reducing),
        Moment(gradients, 0, last + (width + _REDUCED) * parts.outside),
        key=lambda moment: moment.total,
    )


def _padding(architecture: Architecture, layout: Layout) -> float:
    """Rows of experts on all workers together, with those that fill up uneven shares, as a multiple of the experts."""
    if layout.expert > 1:  # divided experts are sharded by rows instead if their number is uneven
        return 1.0
    return -(-architecture.num_experts // layout.shards) * layout.shards / architecture.num_experts
