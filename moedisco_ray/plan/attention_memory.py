"""Bytes per token that a layer's attention and norms save for the backward pass, see `plan.activation_memory`."""

from __future__ import annotations

from moedisco_ray.core.config import Architecture, Optimizer
from moedisco_ray.core.families import DECLARATIONS, Family, FamilyName
from moedisco_ray.core.limits import FLASH_HEAD_SIZE, FLASH_HEAD_STEP
from moedisco_ray.plan.parameters import latent_sizes, recurrent_sizes
from moedisco_ray.plan.recurrent_memory import frozen_recurrent_bytes, recurrent_bytes

_LAYER_NORM_BYTES = 8
"""Mean and deviation that a LayerNorm keeps of a token (bytes)."""


def needs_mask(family: FamilyName, sizes: Architecture, optimizer: Optimizer, gpu: int) -> bool:
    """Whether layers get a mask of the documents of a sequence; `models.attention` decides the same on the device.

    A GPU that computes in bf16 is assumed to have the kernel without masks.
    """
    attention, head = DECLARATIONS[family].attention, sizes.head_size
    by_document = (
        gpu > 0
        and optimizer.arithmetic(bf16=True) == "bf16"
        and not (attention.latent or attention.sinks)
        and head <= FLASH_HEAD_SIZE
        and head % FLASH_HEAD_STEP == 0
    )
    return optimizer.within_documents and not by_document


def attention_bytes(
    family: Family,
    sizes: Architecture,
    width: int,
    residual: int,
    scores: int,
    *,
    masked: bool = False,
    recurrent: bool = False,
) -> int:
    """Bytes per token of the attention of one layer, or of the recurrence in its place.

    Args:
        family: The model's family.
        sizes: Sizes of the model.
        width: Bytes of an element in a matrix product.
        residual: Bytes of an element in the residual stream.
        scores: Scores per token and head, which only heads with sinks store: the sequence length.
        masked: Whether the attention gets a mask of documents.
        recurrent: Whether the layer has a recurrent state in place of attention.
    """
    if recurrent:
        return recurrent_bytes(family, sizes, width, residual, scores)
    held = (_latent_bytes if family.attention.latent else _grouped_bytes)(family, sizes, width)
    return held + _other_bytes(family, sizes, width, residual, scores, masked=masked)


def frozen_attention_bytes(
    family: Family,
    sizes: Architecture,
    width: int,
    residual: int,
    scores: int,
    *,
    masked: bool = False,
    recurrent: bool = False,
) -> int:
    """`attention_bytes` of a layer whose weights get no gradients."""
    if recurrent:
        return frozen_recurrent_bytes(family, sizes, width, residual, scores)
    if family.attention.latent:
        query_latent, latent, plain, rotated, value = latent_sizes(family, sizes)
        per_head = 2 * (plain + rotated) + plain + 2 * value
        held = width * sizes.num_attention_heads * per_head + 4 * (query_latent + latent)
    else:
        queries = sizes.num_attention_heads * sizes.head_size
        both = queries + sizes.key_value_heads * sizes.head_size
        held = width * 2 * both + (4 * both if family.has_qk_norm(sizes.fields) else 0)
        held += family.attention.output_gate * _gate_bytes(queries, width)
    return held + _other_bytes(family, sizes, width, residual, scores, masked=masked)


def _grouped_bytes(family: Family, sizes: Architecture, width: int) -> int:
    queries, keys = sizes.num_attention_heads * sizes.head_size, sizes.key_value_heads * sizes.head_size
    held = width * (2 * (queries + keys) + family.attention.partial_rotation * queries)
    held += family.attention.output_gate * _gate_bytes(queries, width)
    normalised = 4 if family.norms_in_fp32 else width
    return held + ((4 + normalised) * (queries + keys) if family.has_qk_norm(sizes.fields) else 0)


def _gate_bytes(queries: int, width: int) -> int:
    """Bytes of the gate and of the gated output; in fp32 also of the gate's part of what the norm of queries keeps."""
    return (2 * width + (4 if width == 4 else 0)) * queries


def _latent_bytes(family: Family, sizes: Architecture, width: int) -> int:
    query_latent, latent, plain, rotated, value = latent_sizes(family, sizes)
    per_head = 2 * (plain + rotated) + (plain + value) + 2 * value
    return width * sizes.num_attention_heads * per_head + (4 + 2 * width) * (query_latent + latent)


def _other_bytes(family: Family, sizes: Architecture, width: int, residual: int, scores: int, *, masked: bool) -> int:
    """Bytes of log-sum-exps, of a layer's own cosines and sines in fp32, and of scores or repeated keys and values."""
    heads, sinks = sizes.num_attention_heads, family.attention.sinks
    held = 4 * heads + 8 * sizes.head_size * family.attention.own_rotation
    if sinks:
        held += residual * heads * (scores + 1) + (width * heads * scores if residual > width else 0)
    if sinks or (masked and not family.attention.latent):
        held += 2 * width * (heads - sizes.key_value_heads) * sizes.head_size
    return held


def norm_bytes(family: Family, hidden: int, residual: int, *, frozen: bool = False) -> int:
    """Bytes of what a norm keeps besides its output."""
    if family.layer_norms:
        return residual * hidden + _LAYER_NORM_BYTES
    if frozen:
        return 4 * hidden
    return (8 if family.norms_in_fp32 else 4 + residual) * hidden


def normalised_bytes(family: FamilyName, sizes: Architecture, width: int, layers: int) -> int:
    """Bytes per token of the vectors that norms keep only if they are trained, in some layers and the last norm."""
    declaration = DECLARATIONS[family]
    if declaration.layer_norms:
        return 0
    element, inner = 4 if declaration.norms_in_fp32 else width, 0
    if declaration.attention.latent:
        query_latent, latent, *_ = latent_sizes(declaration, sizes)
        inner = query_latent + latent
    elif declaration.has_qk_norm(sizes.fields):
        inner = (sizes.num_attention_heads + sizes.key_value_heads) * sizes.head_size
    recurrent = min(layers, declaration.recurrent_layers(sizes.fields, sizes.num_hidden_layers))
    held = element * ((2 * layers + 1) * sizes.hidden_size + (layers - recurrent) * inner)
    if recurrent:
        _, heads, _, value_size, _ = recurrent_sizes(declaration, sizes)
        held += recurrent * width * heads * value_size
    return held
