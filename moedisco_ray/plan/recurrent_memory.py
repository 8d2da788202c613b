"""Bytes per token that a recurrent layer (Gated DeltaNet) saves for the backward pass, in place of attention.

transformers computes the gated delta rule with plain operations of torch, in fp32 and in chunks of 64 tokens. That is
the path that the plan covers. With the kernels of `flash-linear-attention` and `causal-conv1d`, which transformers uses
where they are installed, a layer keeps less.

With the sizes of `plan.parameters`, expanded keys E = Uc and values V = Uv, M = 2Kc + V channels of the convolution, L
tokens padded to whole chunks by a factor p, and s and r bytes as in `plan.activation_memory`, one token takes:

* the convolution: its input sM, and its output with w - 1 further positions sM(L + w - 1) / L;
* the factors of the update and the decays: sU and 8U; queries and keys before they are normalised, and their norms, 8E
  + 8U;
* in a chunk, queries, keys, and keys times their factor, each before and after decays, and keys that read the state 4p
  6E; values, those that solve the triangular system, and the corrected ones 4p 3V; factors and decays 4p 4U; five
  matrices of 64 by 64 per value head 4p 320U; and the state before each chunk 4pEv / 64;
* in fp32, if the sequence has whole chunks, copies of queries, keys (twice) and keys times their factor 16E;
* the norm and its gate: 12V + 4U, its result twice 2sV, and the input of the output projection sV.

Under autocast, products of matrices within the chunks are computed in bf16. Their inputs are copied, instead of being
kept: the terms of this docstring change by 6pE for vectors, less 256E / L because the first chunk has no state to read,
by -6p 64U for matrices, and by 4pEv / 64 for the states; the product of the norm and its weight takes r - s bytes per
value more.

If the weights get no gradients, neither the normalised values sV, nor the input of the output projection sV, nor 4U of
the decays are kept.
"""

from __future__ import annotations

from moedisco_ray.core.config import Architecture
from moedisco_ray.core.families import Family
from moedisco_ray.plan.parameters import CHUNK, recurrent_sizes

_MATRICES = 5
"""Matrices of a chunk that are kept per value head."""


def recurrent_bytes(family: Family, sizes: Architecture, width: int, residual: int, length: int) -> int:
    """Bytes per token of the recurrent part of one layer.

    Args:
        family: The model's family.
        sizes: Sizes of the model.
        width: Bytes of an element in a matrix product.
        residual: Bytes of an element in the residual stream.
        length: Tokens of a sequence.
    """
    _, heads, _, value_size, _ = recurrent_sizes(family, sizes)
    return frozen_recurrent_bytes(family, sizes, width, residual, length) + 2 * width * heads * value_size + 4 * heads


def frozen_recurrent_bytes(family: Family, sizes: Architecture, width: int, residual: int, length: int) -> int:
    """`recurrent_bytes` of a layer whose weights get no gradients."""
    key_heads, heads, key_size, value_size, window = recurrent_sizes(family, sizes)
    keys, values, padded = heads * key_size, heads * value_size, -(-length // CHUNK) * CHUNK
    channels = 2 * key_heads * key_size + values
    autocast = residual > width
    vectors = 4 * (6 * keys + 3 * values + 4 * heads) + autocast * (6 * keys - 4 * keys * CHUNK // padded)
    matrices = (4 * _MATRICES - 6 * autocast) * CHUNK * heads
    states = (8 if autocast else 4) * keys * value_size // CHUNK
    copies = 16 * keys if width == 4 and padded == length else 0
    held = width * (channels + channels * (length + window - 1) // length + heads) + 8 * keys + 12 * heads + copies
    return held + (vectors + matrices + states) * padded // length + (12 + residual) * values + 4 * heads
