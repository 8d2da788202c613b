"""Stochastic rounding to bf16 and shorter formats, for optimizers whose weights and state are stored in them.

bf16 has 8 significant bits. With rounding to nearest, a weight would lose every update that is smaller than 1/512 of
the weight. If it is rounded up or down at random, with probabilities that make the expected value exact, no update is
lost on average. The random bits come from a generator keyed by (seed, step, rank): the same run gives the same weights,
resumed or not.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

DROPPED_BITS = 16
"""Number of bits by which the fraction of an fp32 number is longer than that of bf16."""


def round_into(target: Tensor, value: Tensor, source: torch.Generator, dropped: int = DROPPED_BITS) -> None:
    """Round fp32 values into a tensor of a shorter dtype; `value` is overwritten.

    Args:
        target: Receives the rounded values.
        value: fp32 values.
        source: Generator of the random bits.
        dropped: Number of bits by which the fraction of fp32 is longer than that of the target's dtype.
    """
    # bf16 is the upper half of fp32: adding 16 random bits carries into it with probability (lower half) / 2^16.
    bits = value.view(torch.int32)
    bits += torch.randint(0, 1 << dropped, bits.shape, generator=source, device=bits.device, dtype=torch.int32)
    bits &= -(1 << dropped)
    target.copy_(value)


def generator(device: torch.device, seed: int | str, step: int, rank: int) -> torch.Generator:
    """Generator of the random bits that one worker uses in one step."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def local(tensor: Any) -> Tensor:
    """This worker's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
