"""Random initial weights; each tensor can be made without the others.

Each tensor has its own generator, keyed by the seed and its canonical name. So a slice of a model is the same on every machine, in
any order, whether or not the rest is ever made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moedisco_ray.models.hf import canonical_shapes


class RandomWeights(Mapping[str, Tensor]):
    """The canonical tensors of a randomly initialised model, made on access."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int, standard_deviation: float,
                 dtype: torch.dtype) -> None:
        self._shapes = shapes
        self._seed = seed
        self._std = standard_deviation
        self._dtype = dtype

    def __getitem__(self, key: str) -> Tensor:
        shape = self._shapes[key]
        if key.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype)
        if key.endswith(".bias"):
            return torch.zeros(shape, dtype=self._dtype)
        generator = torch.Generator().manual_seed(_key_seed(self._seed, key))
        return torch.empty(shape).normal_(0.0, self._std, generator=generator).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def random_weights(config: Mapping[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> RandomWeights:
    """Random initial weights of a model: norms one, biases zero, everything else normal(0, `initializer_range`).

    Args:
        config: `config.json` values of the model.
        seed: Seed; the same seed and configuration give the same bits.
        dtype: Dtype of the tensors.
    """
    return RandomWeights(canonical_shapes(config), seed, float(config.get("initializer_range", 0.02)), dtype)


def _key_seed(seed: int, key: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1    # torch takes signed 64-bit seeds
