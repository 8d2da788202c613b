"""Storage of AdamW's moments: in the dtype of the weights or in 8 bits, on the device or in the machine's memory.

In 8 bits, a moment is a tensor of float8_e4m3fn with a scale for each block of 128 neighbours in a row (for each row, if its length
is no multiple of 128), as in Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861). The format
has a relative error of at most 1/8, and numbers down to 2^-14 of a block's largest keep it. Numbers are rounded at random, so
that a moment changes although each change is smaller than the distance of two numbers. The second moment is stored as its root,
whose numbers spread half as much. A root is at least the smallest number above 0, so that no update is divided by almost nothing.
Scales are powers of two, so a stored moment is exact in fp32 and in bf16: it is the same after it is handed to another training.

Vectors, such as norms and biases, keep the dtype of the weights.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from moedisco_ray.training.rounding import round_into

BLOCK = 128
"""Elements that share a scale: few enough that a large one spoils few others, and 1.6 % of the memory for scales in bf16."""
SCALE = "_scale"
"""Suffix of the key of a moment's scales in the optimizer's state."""
_LARGEST = 240.0
"""Largest stored number, the last one below 256, so that no rounding reaches a power of two, which would have another scale."""
_EXPONENT = 128.0
"""Power of two of the largest stored number."""
_TO_NEXT_POWER = 256 / _LARGEST * (1 - 2.0**-20)
"""Factor with which exactly the numbers above `_LARGEST` reach 256."""
_SMALLEST = 2.0**-9
"""Smallest number of the format above 0."""
_SMALLEST_SCALE = 2.0**-120
_DROPPED_BITS = 20
"""Bits of an fp32 number's fraction that the format does not have."""
_EXPONENT_BITS = 0x7F80_0000
"""Bits of the exponent in an fp32 number; with a fraction of zeros, the number is a power of two."""


def add_moments(state: dict[str, Any], parameter: nn.Parameter, *, fp8: bool, offload: bool) -> None:
    """Put both moments of a parameter, which are zero, into its state in an optimizer.

    Args:
        state: State of the parameter.
        parameter: The parameter.
        fp8: Whether to store matrices in 8 bits.
        offload: Whether to store moments in the machine's memory.
    """
    for key in ("exp_avg", "exp_avg_sq"):
        if fp8 and parameter.ndim > 1:
            scales = parameter.detach()[..., ::_block(parameter)]
            state[key] = _zeros(parameter, torch.float8_e4m3fn, offload=offload)
            state[key + SCALE] = _zeros(scales, torch.bfloat16, offload=offload)
        else:
            state[key] = _zeros(parameter, parameter.dtype, offload=offload)


def elements_at_once(parameter: Tensor, most: int) -> int:
    """Maximum elements of a parameter, in whole blocks, that an update handles at once."""
    block = _block(parameter)
    return max(most // block, 1) * block


def scales_per_part(parameter: Tensor, elements: int) -> int:
    """Number of scales of `elements` elements of a parameter, in whole blocks."""
    return elements // _block(parameter)


def decoded(moment: Tensor, scales: Tensor | None) -> Tensor:
    """A stored moment in fp32, or the root of the second one if it has scales."""
    if scales is None:
        return moment.float()
    return (moment.float().view(scales.numel(), -1) * scales.reshape(-1, 1).float()).view(moment.shape)


def encode(value: Tensor, moment: Tensor, scales: Tensor, source: torch.Generator, *, is_root: bool) -> None:
    """Store an fp32 moment, or the root of the second one, in 8 bits; `value` is overwritten.

    Args:
        value: The moment or the root.
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
    return row if parameter.ndim == 1 or row % BLOCK else BLOCK


def _zeros(like: Tensor, dtype: torch.dtype, *, offload: bool) -> Tensor:
    if not offload or like.device.type == "cpu":
        return torch.zeros_like(like, dtype=dtype)
    moment = torch.zeros(like.shape, dtype=dtype, device="cpu")
    # Pages that cannot be moved are copied without an intermediate copy. (`pin_memory` would round sizes up to powers of two.)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
    runtime.cudaHostRegister(moment.data_ptr(), moment.nbytes, 1)
    weakref.finalize(moment, runtime.cudaHostUnregister, moment.data_ptr())
    return moment
