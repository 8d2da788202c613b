"""Memory of a worker that trains with weights and optimizer state in the host's memory (`plan.streaming`).

On the card there are two layers' weights at a time: the second arrives while the first computes. There are two layers'
gradients: the first leaves while the second adds up. The hidden states of all tokens of a step, or their gradients, are
there all the time, and in the backward pass the kept inputs of two layers as well. The largest of these moments counts:

* a layer's backward pass: weights and gradients of two layers, activations of one layer for a micro-batch, in mixed
  precision copies of a layer's weights, and one of two things: a tensor's gradient before it is added, or, in the
  backward pass of the experts, three tensors of the size of their weighted outputs;
* the head: its weights, the next layer and its inputs, inputs of the layer before that still leave, the head's gradient
  twice, in fp32 too where a tile of logits holds the whole vocabulary, and 64 MiB of logits;
* the embedding: its gradient twice, three times if it is tied to the head;
* the update: three pieces of at most 2^24 elements, or a whole matrix, with weight, gradient and state, and the
  temporary memory of the optimizer (`plan.memory`). One arrives, one is computed, and one leaves.

The host holds weights, gradients and optimizer state of all parameters, and the inputs of each layer for all tokens of
a step: in bf16 with Muon, 6 bytes per parameter. Pages are allocated as they are, without rounding. Several cards have
the gradients that arrive and those that leave, and the host has room for what passes between them.
"""

from __future__ import annotations

from moedisco_ray.core.config import Architecture, Lora, Optimizer
from moedisco_ray.core.families import DECLARATIONS, FamilyName
from moedisco_ray.core.limits import LOGITS_BYTES, STEP_ELEMENTS
from moedisco_ray.plan.activation_memory import layer_bytes_per_token
from moedisco_ray.plan.attention_memory import needs_mask
from moedisco_ray.plan.memory import (
    STATE_BYTES,
    Memory,
    compute_bytes,
    micro_batch_sequences,
    overhead,
    state_bytes,
    step_bytes,
    widest_matrix,
    worker_sequences,
)
from moedisco_ray.plan.parameters import adapter_parameters, count_parameters, largest_layer
from moedisco_ray.plan.timeline import PLACES

_LEAST_TOKENS = 256
"""Tokens from which on a tile of logits holds the whole vocabulary; `training.cross_entropy.LEAST_TOKENS`."""
_BYTES_PER_LOGIT = 16


def streamed_memory(
    family: FamilyName,
    architecture: Architecture,
    vocab_size: int,
    optimizer: Optimizer,
    *,
    sequence_length: int,
    gpu: int,
    cards: int = 1,
    lora: Lora | None = None,
) -> Memory:
    """Peak memory of one worker that trains a model from the host's memory, on each of its cards.

    Args:
        family: The model's family.
        architecture: Sizes of the model.
        vocab_size: Rows of the embedding.
        optimizer: Precision, and sequences of a step and of a micro-batch.
        sequence_length: Tokens per sequence.
        gpu: GPUs of the worker; `precision: auto` depends on whether there are any.
        cards: Number of cards of one machine that share the work.
        lora: Adapters that train instead of the weights; None or rank 0: the weights train.
    """
    parameters = count_parameters(family, architecture, vocab_size)
    rank = 0 if lora is None else lora.rank
    width, (stored, _, _) = compute_bytes(optimizer, gpu), STATE_BYTES[optimizer.state]
    autocast = optimizer.state == "fp32" and width < 4 and not rank
    residual = 4 if autocast else width
    tokens = worker_sequences(optimizer, sequence_length, 1) * sequence_length
    micro = micro_batch_sequences(optimizer, sequence_length, 1) * sequence_length
    passes = -(-tokens // micro)
    masked = needs_mask(family, architecture, optimizer, gpu)
    layer, end = largest_layer(family, architecture, parameters), vocab_size * architecture.hidden_size
    weight = width if rank else stored
    adapters = adapter_parameters(family, architecture, rank)
    trained = adapters // architecture.num_hidden_layers if rank else layer
    states = tokens * residual * architecture.hidden_size
    one = micro * residual * architecture.hidden_size

    saved = micro * layer_bytes_per_token(family, architecture, width, residual, sequence_length, masked=masked)
    added = min(trained, parameters.largest_tensor) * stored if passes > 1 else 0
    in_experts = 0
    if architecture.num_experts > 1:
        weighted = max(width, 4 * DECLARATIONS[family].router.weights_in_fp32)
        in_experts = 3 * micro * architecture.num_experts_per_tok * architecture.hidden_size * weighted
    in_layer = {
        "weights": PLACES * layer * weight,
        "gradients": PLACES * trained * stored + (added if added > in_experts else 0),
        "activations": (1 + PLACES + 2 * (cards > 1)) * states
        + 2 * one
        + saved
        + (in_experts if added <= in_experts else 0),
        "compute_copies": width * layer * autocast,
    }
    whole_tiles = vocab_size * _LEAST_TOKENS <= LOGITS_BYTES // _BYTES_PER_LOGIT
    in_head = {
        "weights": end * weight + layer * weight,
        "gradients": 0 if rank else end * (stored * (1 + (passes > 1)) + 4 * whole_tiles),
        "activations": 3 * states + micro * architecture.hidden_size * (residual + width + 4) + LOGITS_BYTES,
        "compute_copies": 0,
    }
    tied = 1 if architecture.tie_word_embeddings else 0
    in_embedding = {
        "weights": 0,
        "gradients": 0 if rank else end * stored * (1 + (passes > 1) + tied),
        "activations": 2 * states,
        "compute_copies": 0,
    }
    moments = state_bytes(optimizer, adapters or parameters.total, 0 if rank else parameters.matrices)
    largest = max(parameters.largest_tensor, widest_matrix(family, architecture))
    piece = min(largest, max(STEP_ELEMENTS, widest_matrix(family, architecture)), adapters or largest)
    per_element = 2 * stored + moments / (adapters or parameters.total)
    in_update = {
        "weights": round((PLACES + 1) * piece * per_element),
        "gradients": 0,
        "activations": 0,
        "compute_copies": 0,
        "optimizer_step": step_bytes(optimizer, widest_matrix(family, architecture), piece),
    }
    parts = max((in_layer, in_head, in_embedding, in_update), key=lambda each: sum(each.values()))
    weights = parameters.total * weight + adapters * stored
    inputs = architecture.num_hidden_layers * states
    if cards > 1:  # what passes between the cards, and each one's part of the head's gradient
        inputs += (1 + cards) * states + (0 if rank else cards * end * stored)
    return Memory(
        **{"optimizer": 0, "optimizer_step": 0, **parts},
        overhead=overhead(sum(parts.values())),
        offloaded=moments,
        streamed=weights,
        host=weights + (adapters or parameters.total) * stored + moments + inputs,
    )
