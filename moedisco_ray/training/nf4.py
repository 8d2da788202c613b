"""Weights in 4 bits: the NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314), with double quantisation.

A weight is the product of one of 16 levels and the scale of its block of 64 neighbours, the largest absolute value
among them. The levels are quantiles of a normal distribution, which weights resemble. Scales differ little, so only
their distances from their mean are stored, in 8 bits, with a factor in fp32 for each 256 of them. A weight then takes
4.127 bits.

The arithmetic is torch's, so it is the same on every device, and equals that of bitsandbytes but for the 8-bit format
of the scales: theirs is a table, ours is float8_e4m3fn. Reading a weight costs a few operations per element and pass,
whatever the number of tokens, so a kernel of its own would save little of a step.

Axes: N elements of a tensor, P pairs of them, S blocks.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from moedisco_ray.core.limits import NF4_BLOCK, NF4_GROUP

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Values of the 16 codes, from appendix E of the paper."""
_ELEMENTS = 2**22
"""Maximum number of weights that are converted at once, which takes 10 bytes each."""
_LARGEST = 448.0
"""Largest number of the scales' format."""
_SMALLEST = 1e-38
"""Least divisor, for blocks of zeros."""


class Nf4(nn.Module):
    """The values of a weight in 4 bits; none are stored before `store`.

    The buffers belong to no checkpoint: they are made again from the model that a training starts from.

    Args:
        weight: A tensor whose shape, dtype and device the weight has.
    """

    codes_P: Tensor
    scales_S: Tensor
    factors: Tensor
    mean: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        blocks = -(-weight.numel() // NF4_BLOCK)
        buffers = {
            "codes_P": weight.new_empty(blocks * NF4_BLOCK // 2, dtype=torch.uint8),
            "scales_S": weight.new_empty(blocks, dtype=torch.float8_e4m3fn),
            "factors": weight.new_empty(-(-blocks // NF4_GROUP), dtype=torch.float32),
            "mean": weight.new_empty((), dtype=torch.float32),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Round a weight to 4 bits."""
        flat_N = weight.flatten()
        if missing := -len(flat_N) % NF4_BLOCK:  # padding makes a copy
            flat_N = functional.pad(flat_N, (0, missing))
        levels = torch.tensor(LEVELS, device=weight.device)
        bounds = (levels[:-1] + levels[1:]) / 2
        largest = []
        parts, codes = torch.split(flat_N, _ELEMENTS), torch.split(self.codes_P, _ELEMENTS // 2)
        for part_N, codes_P in zip(parts, codes, strict=True):
            blocks_SB = part_N.view(-1, NF4_BLOCK).float()
            largest.append(blocks_SB.abs().amax(dim=1))
            scaled_SB = blocks_SB * (1 / largest[-1].clamp_min(_SMALLEST))[:, None]
            pairs_P2 = torch.bucketize(scaled_SB, bounds, out_int32=True).view(-1, 2)
            codes_P.copy_(pairs_P2[:, 0] * 16 + pairs_P2[:, 1])
        scales_S = torch.cat(largest)
        self.mean.copy_(scales_S.mean())
        apart_S = functional.pad(scales_S - self.mean, (0, -len(scales_S) % NF4_GROUP)).view(-1, NF4_GROUP)
        self.factors.copy_(apart_S.abs().amax(dim=1).clamp_min(_SMALLEST) / _LARGEST)
        self.scales_S.copy_((apart_S / self.factors[:, None]).flatten()[: len(scales_S)])

    def dense(self) -> Tensor:
        """A new tensor with the stored values, of the shape and dtype of the weight."""
        values = torch.empty(self.shape, dtype=self.dtype, device=self.codes_P.device)
        pairs = torch.tensor(list(itertools.product(LEVELS, LEVELS)), device=values.device)
        parts = zip(
            torch.split(values.view(-1), _ELEMENTS),
            torch.split(self.codes_P, _ELEMENTS // 2),
            torch.split(self.scales_S, _ELEMENTS // NF4_BLOCK),
            torch.split(self.factors, _ELEMENTS // NF4_BLOCK // NF4_GROUP),
            strict=True,
        )
        for part_N, codes_P, scales_S, factors in parts:
            scales_S1 = (scales_S.float() * factors.repeat_interleave(NF4_GROUP)[: len(scales_S)] + self.mean)[:, None]
            part_N.copy_(pairs[codes_P.int()].view(-1, NF4_BLOCK).mul_(scales_S1).view(-1)[: len(part_N)])
        return values
