"""Bytes of the activations that a training saves for the backward pass, by layer and token.

Activations are counted tensor by tensor, as autograd saves them. The method is that of Korthikanti et al., "Reducing
activation recomputation in large transformer models" (arXiv 2205.05198, section 4.1), applied to layers with RMSNorm,
SwiGLU and attention that never stores its L x L scores. An element takes s bytes in a matrix product and r bytes in the
residual stream (r = 4 under autocast, else r = s). Then the activations of one token in one decoder layer take these
bytes:

* two RMSNorms, each keeping its input in fp32, the normalised vector, and its output: 2 (4 + r + s) D; or two
  LayerNorms, each keeping its input, its output, and a mean and a deviation in fp32: 2 ((r + s) D + 8);
* attention: queries, keys, values and the output, s (2Hd + 2Gd), and a log-sum-exp of 4 bytes per head; where queries
  and keys are normalised, their fp32 copies and normalised vectors too: (4 + s)(Hd + Gd), or 8(Hd + Gd) in families
  whose norms multiply by their weight in fp32 (there, r = 4 in the norms above too); where the output has a gate, the
  gate and the product 2sHd, and in fp32 4Hd more of the query projection; where only a part of each head is
  rotated, a copy of the output: sHd; where heads have sinks, no fused attention stores less than the scores rH(L + 1),
  under autocast also in bf16, and keys and values for every head: 2s(H - G)d; where every layer makes its own cosines
  and sines: 8d;
* latent attention: queries and keys 2sH(n + p), the product that holds the values sH(n + v), the output and its copy
  2sHv, and the normalised latents (4 + 2s)(r + q), with the sizes of `plan.parameters`;
* a recurrent state in place of attention: see `plan.recurrent_memory`;
* each of its k experts: a copy of the token, gate and up (one tensor), the activated gate, the product of gate and up,
  and the output before the router's weight scales it: s (2D + 4F), with the activation of gpt_oss s (2D + 7F); a
  layer's only expert, which runs as a dense MLP: 4sF, or 7sF; a shared expert: 4sS, and sD if it has a gate;
* the router: 4E for the scores, and 44k for the indices, weights and sort order of the selected experts; one that
  computes in fp32 keeps an fp32 copy of its input and of its scores, 4D + 8E, unless its input is in fp32 already; one
  that does so under autocast too keeps the input itself, (r - s)D more; SparseMixer keeps two softmaxes with their
  masks, (2r + 2)E; one with a first layer of h hidden units keeps them, sh;
* under autocast, each matrix product makes its own copy of its input in s bytes per element. So where several products
  have the same input (such as those for queries, keys and values), each product after the first adds sD.

For each token, the last norm adds (4 + r + s) D bytes, or (r + s) D + 8, and the gradient of its output 4D.

With gradient checkpointing, a layer keeps only its input (rD bytes per token), and one layer at a time is recomputed in
full.

With `within_documents`, a GPU that computes in bf16 needs nothing more, because FlashAttention computes each document
by itself. In fp32, on a CPU and with latent attention, all layers share a mask of sL bytes per token, and each layer
copies keys and values for every head, 2s(H - G)d; only heads with sinks, which do both anyway, need no more.

With `block_steps`, most weights are frozen. Frozen weights need no input of their matrix product for a gradient, so a
layer keeps less: its norms 4 bytes of D each, an expert s (D + 3F), or 3sF if it is the only one, a shared expert s (D
+ 3S), and no copies under autocast.

Letters: D hidden, H attention heads, G key-value heads, d head size, E experts, F expert hidden, S shared expert
hidden, V vocabulary, k top-k.
"""

from __future__ import annotations

from collections.abc import Callable

from moedisco_ray.core.config import Architecture
from moedisco_ray.core.families import DECLARATIONS, Family, FamilyName
from moedisco_ray.plan.attention_memory import attention_bytes, frozen_attention_bytes, norm_bytes
from moedisco_ray.plan.parameters import shared_hidden_size

_SCORE_BYTES = 4
"""A router's score (bytes per token and expert)."""
SELECTION_BYTES = 44
"""Indices, weights and sort order (bytes per token and selected expert), measured in the models of transformers 5."""


def activation_bytes_per_token(
    family: FamilyName,
    architecture: Architecture,
    width: int,
    *,
    residual: int,
    checkpointing: bool,
    sequence_length: int,
    frozen: bool = False,
    masked: bool = False,
) -> int:
    """Bytes of activations per token of the micro-batch, without logits, by the formula in this module's docstring.

    Args:
        family: The model's family.
        architecture: Sizes of the model.
        width: Bytes of an element in a matrix product.
        residual: Bytes of an element in the residual stream.
        checkpointing: Whether layers are recomputed in the backward pass.
        sequence_length: Tokens per sequence.
        frozen: Whether one layer trains and the others only pass gradients on.
        masked: Whether layers get a mask of documents; see `needs_mask`.
    """

    def measure(function: Callable[..., int], kind: bool) -> int:
        return function(family, architecture, width, residual, sequence_length, masked=masked, recurrent=kind)

    layers, hidden, kinds = architecture.num_hidden_layers, architecture.hidden_size, _layer_kinds(family, architecture)
    saved = {kind: measure(layer_bytes_per_token, kind) for kind in kinds}
    others = {kind: measure(frozen_bytes_per_token, kind) for kind in kinds} if frozen else saved
    largest = max(kinds, key=saved.__getitem__)
    kept = (
        layers * residual * hidden
        if checkpointing
        else sum(kinds[kind] * others[kind] for kind in kinds) - others[largest]
    )
    kept += saved[largest]
    kept += width * sequence_length * masked
    return kept + norm_bytes(DECLARATIONS[family], hidden, residual) + (width + 4) * hidden


def _layer_kinds(family: FamilyName, architecture: Architecture) -> dict[bool, int]:
    """Number of layers with a recurrent state (True) and with attention (False), of the kinds that the model has."""
    layers = architecture.num_hidden_layers
    recurrent = DECLARATIONS[family].recurrent_layers(architecture.fields, layers)
    return {kind: count for kind, count in ((True, recurrent), (False, layers - recurrent)) if count}


def layer_bytes_per_token(
    family: FamilyName,
    architecture: Architecture,
    width: int,
    residual: int,
    sequence_length: int,
    *,
    masked: bool = False,
    recurrent: bool | None = None,
) -> int:
    """Bytes per token of the activations that one MoE layer saves for the backward pass.

    Args:
        family: The model's family.
        architecture: Sizes of the model.
        width: Bytes of an element in a matrix product.
        residual: Bytes of an element in the residual stream.
        sequence_length: Tokens per sequence.
        masked: Whether the attention gets a mask of documents.
        recurrent: Whether the layer has a recurrent state in place of attention; None: the kind of layer that saves
            most.
    """
    if recurrent is None:
        return max(
            layer_bytes_per_token(family, architecture, width, residual, sequence_length, masked=masked, recurrent=kind)
            for kind in _layer_kinds(family, architecture)
        )
    declaration, hidden = DECLARATIONS[family], architecture.hidden_size
    norms = 2 * (norm_bytes(declaration, hidden, residual) + width * hidden)
    attention = attention_bytes(
        declaration, architecture, width, residual, sequence_length, masked=masked, recurrent=recurrent
    )
    routes = architecture.num_experts > 1
    expert = declaration.expert_activations * architecture.moe_intermediate_size + (2 * hidden if routes else 0)
    shared = shared_hidden_size(family, architecture)
    gate = declaration.shared is not None and declaration.shared.gate is not None
    held = norms + attention + width * architecture.num_experts_per_tok * expert + width * (4 * shared + gate * hidden)
    if routes:
        held += _router_bytes(declaration, architecture, width, residual)
        if declaration.router.in_fp32 and residual < 4:
            held += 4 * hidden
        if declaration.router.without_autocast:
            held += (residual - width) * hidden
    # Autocast copies the input of each matrix product to bf16. `norms` holds the copies for the query projection and
    # for the router (with one expert: its gate projection). More copies: for keys, for values (a latent is one
    # projection), or for the further projections of a recurrent layer; for a single expert's up projection unless it is
    # one matrix with the gate's; and for the shared expert's gate and up projections and its gate.
    mixing = 2 - declaration.attention.latent
    if recurrent and declaration.recurrence is not None:
        mixing = len(declaration.recurrence.projections) - 1
    casts = mixing + (not routes and not declaration.interleaved) + (2 + gate if shared else 0)
    casts *= residual > width
    return held + casts * width * hidden


def frozen_bytes_per_token(
    family: FamilyName,
    architecture: Architecture,
    width: int,
    residual: int,
    sequence_length: int,
    *,
    masked: bool = False,
    recurrent: bool = False,
) -> int:
    """Bytes of one layer's saved tensors per token, if its weights get no gradients; see `layer_bytes_per_token`."""
    declaration, hidden = DECLARATIONS[family], architecture.hidden_size
    attention = frozen_attention_bytes(
        declaration, architecture, width, residual, sequence_length, masked=masked, recurrent=recurrent
    )
    experts = (declaration.expert_activations - 1) * architecture.moe_intermediate_size
    routes = architecture.num_experts > 1
    experts += hidden if routes else 0
    shared = shared_hidden_size(family, architecture)
    gate = declaration.shared is not None and declaration.shared.gate is not None
    norms = 2 * norm_bytes(declaration, hidden, residual, frozen=True)
    held = norms + attention + width * architecture.num_experts_per_tok * experts
    return (
        held + width * (gate * hidden + 3 * shared) + routes * _router_bytes(declaration, architecture, width, residual)
    )


def _router_bytes(family: Family, sizes: Architecture, width: int, residual: int) -> int:
    """Bytes of hidden units, scores and selected experts; a router in fp32 keeps its scores in fp32 too."""
    score = _SCORE_BYTES + (8 if family.router.in_fp32 and residual < 4 else 0)
    if family.router.scores == "sparse_mixer":
        score = 2 * (residual + 1)
    units = family.router.hidden_size(sizes.fields, sizes.num_experts)
    return width * units + score * sizes.num_experts + SELECTION_BYTES * sizes.num_experts_per_tok
