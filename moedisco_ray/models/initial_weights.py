"""Initial weights of a whole model, made tensor by tensor: random, or grown from a trained seed model.

Each random tensor has its own generator, keyed by the seed and its canonical name. So a slice of a model is the same on
every machine, in any order, whether or not the rest is ever made.

Shapes: E experts, D hidden, g experts of the seed model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moedisco_ray.core.families import Initial
from moedisco_ray.models.checks import check_complete
from moedisco_ray.models.hf import canonical_shapes
from moedisco_ray.models.layout import ModelMap
from moedisco_ray.models.roles import Role

_RULES: Mapping[str, Initial] = {"norm.weight": "ones", "bias": "zeros"}
_ROW_NOISE = 0.1
"""Standard deviation of the noise on copied router rows, relative to that of the rows."""
_TINY = 1e-30
_DECAYS = (0.01, 16.0)
"""Range of the initial rates of decay of a recurrent state, as in transformers' Gated DeltaNet."""


class RandomWeights(Mapping[str, Tensor]):
    """The canonical tensors of a randomly initialised model in fp32, made on access.

    Args:
        shapes: Shapes of the tensors by name.
        seed: Seed; the same seed gives the same bits.
        standard_deviation: Standard deviation of normally distributed tensors.
        initial: How tensors are filled by the end of their name, the first that fits; see `Family.initial`.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        seed: int,
        standard_deviation: float,
        initial: Mapping[str, Initial],
    ) -> None:
        self._shapes = shapes
        self._seed = seed
        self._std = standard_deviation
        self._initial = (*initial.items(), *_RULES.items())

    def __getitem__(self, key: str) -> Tensor:
        empty = torch.empty(self._shapes[key], dtype=torch.float32)
        kind = next((kind for end, kind in self._initial if key.endswith(end)), None)
        if kind == "zeros":
            return empty.zero_()
        if kind == "ones":
            return empty.fill_(1.0)
        generator = torch.Generator().manual_seed(key_seed(self._seed, key))
        if kind == "log_uniform":
            return empty.uniform_(*_DECAYS, generator=generator).log_()
        return empty.normal_(0.0, self._std, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def random_weights(config: Mapping[str, Any], seed: int) -> RandomWeights:
    """Random initial weights of a model: norms one, biases zero, everything else normal(0, `initializer_range`).

    Families may declare other values for some tensors.

    Args:
        config: `config.json` values of the model.
        seed: Seed; the same seed and configuration give the same bits.
    """
    initial = ModelMap(str(config.get("model_type"))).family.initial
    return RandomWeights(canonical_shapes(config), seed, float(config.get("initializer_range", 0.02)), initial)


class SeededWeights(Mapping[str, Tensor]):
    """The canonical tensors of a whole MoE that is grown from a seed model, made on access.

    Backbone and shared expert are those of the seed. Expert e is the seed's expert e mod g. If g > 1, each expert keeps
    its router row, with noise where copies must differ. If g = 1, the seed's router has learnt nothing, and the router
    rows are the initial ones, which differ between experts.

    Args:
        seed: Canonical tensors of the seed model.
        initial: Canonical tensors of the randomly initialised MoE.
        model_map: Tensor names of the family.
        distinct_rows: Whether copies of an expert get different router rows.

    Raises:
        CheckpointError: The seed model lacks a tensor.
    """

    def __init__(
        self, seed: Mapping[str, Tensor], initial: Mapping[str, Tensor], model_map: ModelMap, *, distinct_rows: bool
    ) -> None:
        self._distinct_rows = distinct_rows
        self._seed = seed
        self._initial = initial
        self._map = model_map
        self._group = model_map.experts(seed)
        check_complete(seed, map(self._seed_key, initial))

    def __getitem__(self, key: str) -> Tensor:
        role = self._map.classify(key)
        axis = role.expert_axis
        if axis is None:
            tensor = self._seed[self._seed_key(key)]
            # Copies of an expert would share memory, and safetensors refuses tensors that do.
            return tensor if role.expert is None else tensor.clone()
        rows_gD, initial_ED = self._seed[key], self._initial[key]
        if role.role is Role.ROUTER and rows_gD.shape[axis] == 1:
            return initial_ED
        copies_ED = torch.cat([rows_gD] * (initial_ED.shape[axis] // rows_gD.shape[axis]), dim=axis)
        if role.role is not Role.ROUTER or not self._distinct_rows or copies_ED.shape == rows_gD.shape:
            return copies_ED
        noise_ED = initial_ED * (_ROW_NOISE * rows_gD.std() / initial_ED.std().clamp(min=_TINY))
        noise_ED.narrow(axis, 0, rows_gD.shape[axis]).zero_()
        return (copies_ED + noise_ED).to(rows_gD.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._initial)

    def __len__(self) -> int:
        return len(self._initial)

    def _seed_key(self, key: str) -> str:
        role = self._map.classify(key)
        if role.layer is None or role.expert is None or role.layer not in self._group:
            return key
        return self._map.renumbered(key, role.expert % self._group[role.layer])


def with_seed(
    seed: Mapping[str, Tensor], initial: Mapping[str, Tensor], model_map: ModelMap, *, distinct_rows: bool = False
) -> SeededWeights:
    """The weights of a whole MoE that is grown from a seed model.

    Args:
        seed: Canonical tensors of the trained seed model, with g experts per layer.
        initial: Canonical tensors of the randomly initialised MoE; gives the names, the router rows if g = 1, and the
            noise.
        model_map: Tensor names of the family.
        distinct_rows: Add noise to the rows of all copies of an expert but the first, as Expert Upcycling (arXiv
            2604.19835) does. Copies of an expert in one model need different rows: with copies of one row they would
            stay equal forever.

    Raises:
        CheckpointError: The seed model lacks a tensor.
    """
    return SeededWeights(seed, initial, model_map, distinct_rows=distinct_rows)


def key_seed(seed: int, key: str) -> int:
    """The seed of one tensor's random numbers, from the seed of all tensors and its name."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes signed 64-bit seeds
