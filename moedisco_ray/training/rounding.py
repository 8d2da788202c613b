"""Stochastic rounding to bf16, for optimizers with weights and state in bf16.

bf16 has 8 significant bits. With rounding to nearest, a weight would lose every update below 1/512 of it. Rounded up or down at
random, with probabilities that make the expected value exact, no update is lost on average. The random bits come from a generator
keyed by (seed, step, rank): the same run gives the same weights, resumed or not.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def round_into(target: Tensor, value: Tensor, source: torch.Generator) -> None:
    """Round fp32 values stochastically into a bf16 tensor; `value` is overwritten."""
    # bf16 is the upper half of fp32: adding 16 random bits carries into it with probability (lower half) / 2^16.
    bits = value.view(torch.int32)
    bits += torch.randint(0, 1 << 16, bits.shape, generator=source, device=bits.device, dtype=torch.int32)
    bits &= -(1 << 16)
    target.copy_(value)


def generator(device: torch.device, seed: int | str, step: int, rank: int) -> torch.Generator:
    """Generator of the random bits that one worker uses in one step."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def local(tensor: Any) -> Tensor:
    """This worker's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
