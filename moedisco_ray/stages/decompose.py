"""Slicing a Mixture-of-Experts into one sub-model per cluster, tensor by tensor.

Sub-model k of C has the whole backbone and shared expert, and the k-th group of g = E / C routed experts of every layer
with their router rows, renumbered from 0. It is a model of the same family; with g = 1 it computes a dense model.

Shapes: E experts, D hidden, g experts per group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import (
    DEFAULT_SHARD_BYTES,
    ModelMap,
    Role,
    canonical_shapes,
    check_complete,
    check_experts,
    expert_count,
    group_size,
    submodel_config,
    write_checkpoint,
)


def decompose(source: Mapping[str, Tensor], model_map: ModelMap, num_experts: int, clusters: int,
              cluster: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one sub-model, in the source's order. Experts of other groups are never read.

    Args:
        source: Canonical tensors of the whole MoE.
        model_map: Names of its family.
        num_experts: E, in every MoE layer.
        clusters: Sub-models.
        cluster: Index k of this one.

    Raises:
        CheckpointError: A tensor is unknown or missing, or a layer has another number of experts.
        ConfigError: The clusters do not divide the experts.
    """
    group = group_size(num_experts, clusters)
    first = cluster * group
    check_experts(source, model_map, num_experts)
    for key in source:
        role = model_map.classify(key)
        if role.role is Role.ROUTER:
            yield key, _rows(key, source[key], num_experts, slice(first, first + group))
        elif role.expert is None:
            yield key, source[key]
        elif first <= role.expert < first + group:
            yield model_map.renumbered(key, role.expert - first), source[key]


def _rows(key: str, w_ED: Tensor, num_experts: int, rows: slice) -> Tensor:
    if len(w_ED) != num_experts:
        raise CheckpointError("tensor", key, f"has {len(w_ED)} rows for {num_experts} experts")
    return w_ED[rows].clone()


def write_submodels(source: Mapping[str, Tensor], config: Mapping[str, Any], clusters: int, directory: Path,
                    max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[int]:
    """Write every sub-model to `directory`/k, one after another; at most one shard is in memory.

    Args:
        source: Canonical tensors of the whole MoE.
        config: Its `config.json`.
        clusters: Sub-models.
        directory: Where to.
        max_shard_bytes: As in `write_checkpoint`.

    Returns:
        Bytes of each sub-model.

    Raises:
        CheckpointError: The source's tensors are not those that its configuration describes.
        ConfigError: The clusters do not divide the experts.
    """
    model_map = ModelMap(str(config.get("model_type")))
    check_complete(source, canonical_shapes(config))
    num_experts = expert_count(config)
    values = submodel_config(config, group_size(num_experts, clusters))
    return [
        write_checkpoint(directory / str(cluster), decompose(source, model_map, num_experts, clusters, cluster), values,
                         max_shard_bytes)
        for cluster in range(clusters)]


class SeededSource(Mapping[str, Tensor]):
    """A whole MoE grown from a common dense seed: a mapping that reads from the seed what it has.

    Backbone and shared expert are the seed's. With g experts in the seed, expert e is the seed's expert e mod g. Router
    rows go with their experts when g > 1, unless the router is fresh; with g = 1 the seed's router has learnt nothing, so the
    rows stay the initial ones, which differ from expert to expert.
    """

    def __init__(
        self, seed: Mapping[str, Tensor], initial: Mapping[str, Tensor], model_map: ModelMap, *, fresh_router: bool,
    ) -> None:
        self._fresh_router = fresh_router
        self._seed = seed
        self._initial = initial
        self._map = model_map
        self._group = model_map.experts(seed)
        check_complete(seed, map(self._seed_key, initial))

    def __getitem__(self, key: str) -> Tensor:
        role = self._map.classify(key)
        if role.role is not Role.ROUTER:
            found = self._seed[self._seed_key(key)]
            # Two experts read the same bytes of a mapped file, and safetensors refuses tensors that share their memory.
            return found if role.expert is None else found.clone()
        rows_gD, initial_ED = self._seed[key], self._initial[key]
        if self._fresh_router or len(rows_gD) == 1:
            return initial_ED
        return rows_gD.repeat(len(initial_ED) // len(rows_gD), 1)

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
    seed: Mapping[str, Tensor], initial: Mapping[str, Tensor], model_map: ModelMap, *, fresh_router: bool = False,
) -> SeededSource:
    """The whole MoE, read from a seed model.

    Args:
        seed: Canonical tensors of the trained common model, g experts per layer.
        initial: Canonical tensors of the whole MoE at initialisation; gives its names, and router rows where g = 1.
        model_map: Names of their family.
        fresh_router: Router rows are the initial ones also where g > 1: copies of an expert that are all to be in one model
            would have copies of its row, and nothing would ever tell them apart.

    Raises:
        CheckpointError: The seed lacks a tensor.
    """
    return SeededSource(seed, initial, model_map, fresh_router=fresh_router)
