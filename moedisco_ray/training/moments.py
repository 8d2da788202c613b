"""Storage of AdamW's moments: in the dtype of the weights or in 8 bits, on the device or in the machine's memory.

In 8 bits, a moment is a tensor of float8_e4m3fn with a scale for each block of 128 neighbours in a row (for each row,
if its length is no multiple of 128), as in Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv
2110.02861). The relative error is at most 1/8, for numbers down to 2^-14 of the largest in their block. Numbers are
rounded at random, so that a moment changes although each change is smaller than the distance between two numbers of the
format. The second moment is stored as its root, because the exponents of roots spread half as far. A stored root is at
least the smallest positive number, so that no update is divided by almost nothing. Scales are powers of two, so a
stored moment is exact in fp32 and in bf16: it is the same after it is handed to another training.

Vectors, such as norms and biases, keep the dtype of the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moedisco_ray.core.limits import MOMENT_BLOCK
from moedisco_ray.training.host_copies import pin
from moedisco_ray.training.rounding import round_into

SCALE = "_scale"
"""Suffix of the key of a moment's scales in the optimizer's state."""
_LARGEST = 240.0
"""Largest number that is stored: the 8-bit format's largest number below 256. Moments are scaled to at most this
number, so that none is rounded up to 256, which would need another scale."""
_EXPONENT = 128.0
"""Largest power of two that is not above `_LARGEST`."""
_TO_NEXT_POWER = 256 / _LARGEST * (1 - 2.0**-20)
"""Factor that makes a number 256 or more if it is above `_LARGEST`, but not if it equals `_LARGEST`."""
_SMALLEST = 2.0**-9
"""Smallest positive number of the format."""
_SMALLEST_SCALE = 2.0**-120
_DROPPED_BITS = 20
"""Number of bits by which the fraction of an fp32 number is longer than that of the 8-bit format."""
_EXPONENT_BITS = 0x7F80_0000
"""Mask of the exponent's bits in a positive fp32 number. If only these bits are kept, the number is rounded down to a
power of two."""


def add_moments(state: dict[str, Any], parameter: nn.Parameter, *, fp8: bool, offload: bool) -> None:
    """Add both moments of a parameter to its state in an optimizer, with all elements zero.

    Args:
        state: State of the parameter.
        parameter: The parameter.
        fp8: Whether to store matrices in 8 bits.
        offload: Whether to store moments in the machine's memory.

    Raises:
        ConfigError: The machine cannot lock the memory.
    """
    for key in ("exp_avg", "exp_avg_sq"):
        if fp8 and parameter.ndim > 1:
            scales = parameter.detach()[..., :: _block(parameter)]
            state[key] = _zeros(parameter, torch.float8_e4m3fn, offload=offload)
            state[key + SCALE] = _zeros(scales, torch.bfloat16, offload=offload)
        else:
            state[key] = _zeros(parameter, parameter.dtype, offload=offload)


def elements_at_once(parameter: Tensor, most: int) -> int:
    """Maximum number of a parameter's elements that an update handles at once, rounded to whole blocks."""
    block = _block(parameter)
    return max(most // block, 1) * block


def scales_per_part(parameter: Tensor, elements: int) -> int:
    """Number of scales of `elements` elements of a parameter, which must be whole blocks."""
    return elements // _block(parameter)


def decoded(moment: Tensor, scales: Tensor | None) -> Tensor:
    """A stored moment in fp32.

    If a second moment has scales, its root is returned, because the root is what is stored.
    """
    if scales is None or not moment.numel():
        return moment.float()
    return (moment.float().view(scales.numel(), -1) * scales.reshape(-1, 1).float()).view(moment.shape)


def encode(value: Tensor, moment: Tensor, scales: Tensor, source: torch.Generator, *, is_root: bool) -> None:
    """Store the first moment, or the root of the second moment, in 8 bits; `value` is overwritten.

    Args:
        value: The first moment, or the root of the second, in fp32.
        moment: Receives the 8-bit numbers.
        scales: Receives the scales.
        source: Generator of the random bits of rounding.
        is_root: Whether `value` is a root.
    """
    blocks = value.view(scales.numel(), -1)
    scale = blocks.abs().amax(dim=1, keepdim=True).mul_(_TO_NEXT_POWER)
    scale.view(torch.int32).bitwise_and_(_EXPONENT_BITS)
    scale.div_(_EXPONENT).clamp_min_(_SMALLEST_SCALE)
    scales.copy_(scale.view(scales.shape))
    blocks.div_(scale).clamp_(_SMALLEST if is_root else -_LARGEST, _LARGEST)
    round_into(moment, value, source, _DROPPED_BITS)


def _block(parameter: Tensor) -> int:
    row = int(parameter.shape[-1])
    return row if parameter.ndim == 1 or row % MOMENT_BLOCK else MOMENT_BLOCK


def _zeros(like: Tensor, dtype: torch.dtype, *, offload: bool) -> Tensor:
    if not offload or like.device.type == "cpu":
        return torch.zeros_like(like, dtype=dtype)
    return locked(torch.zeros(like.shape, dtype=dtype, device="cpu"))


def locked(moment: Tensor) -> Tensor:
    """Keep the pages of a moment in the machine's memory where they are; return it.

    Raises:
        ConfigError: The machine cannot lock the memory.
    """
    return pin(moment, "optimizer.offload_moments", value=True, remedy="set it to false")
