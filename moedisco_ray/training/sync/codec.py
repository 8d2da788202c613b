"""Codes of 4 bits for changes of weights: whole numbers from -7 to 7, with a scale in float32 for each block.

For the values v of a block, all computed in float32, element by element, halves rounded to the even code:

    s = max |v| / 7,    q = round(v / s),    decoded v = s q.

So |v - s q| is at most s / 2, up to rounding. A block is stored as its scale and then q + 8, two elements in a byte,
the first one in its low half: 132 bytes for 256 elements, 0.129 of float32.

No sum is computed, so the codes are the same bits on every CPU. What the codes lose must be added to the next values
(error feedback: Seide et al., "1-bit stochastic gradient descent", Interspeech 2014); else it is lost in every sync.

Shape: N elements, C bytes of codes, B blocks of E = 256 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moedisco_ray.policies.sync_points import BLOCK, BLOCK_BYTES

_SCALE_BYTES = 4
_LARGEST = 7
_ZERO = 8
"""Code of 0; the codes are 1 to 15."""


class NoCodesError(ValueError):
    """A value is not finite, so no scale fits its block."""


def encode(values_N: Tensor) -> Tensor:
    """The codes of float32 values on the CPU, uint8 of shape [C].

    Raises:
        NoCodesError: A value is not finite.
    """
    blocks_BE = pad(values_N, (0, -len(values_N) % BLOCK)).view(-1, BLOCK)
    scale_B1 = blocks_BE.abs().amax(1, keepdim=True) / _LARGEST
    if not bool(scale_B1.isfinite().all()):
        raise NoCodesError("a value is not finite")
    # Where no scale is left of the smallest numbers, their codes are 0.
    codes_BE = (blocks_BE / torch.where(scale_B1 > 0, scale_B1, 1.0)).round_().clamp_(-_LARGEST, _LARGEST)
    codes_BE = codes_BE.add_(_ZERO).to(torch.uint8)
    return torch.cat((scale_B1.view(torch.uint8), codes_BE[:, ::2] | codes_BE[:, 1::2] << 4), 1).view(-1)


def decode(codes_C: Tensor, elements: int) -> Tensor:
    """The values of the first N elements of some codes, in float32."""
    blocks = codes_C.view(-1, BLOCK_BYTES)
    scale_B1 = blocks[:, :_SCALE_BYTES].contiguous().view(torch.float32)
    packed = blocks[:, _SCALE_BYTES:]
    codes_BE = torch.stack((packed & 15, packed >> 4), 2).view(-1, BLOCK).float()
    return (codes_BE.sub_(_ZERO) * scale_B1).view(-1)[:elements]
