"""A whole MoE grown from a dense seed model, tensor by tensor.

Shapes: E experts, D hidden, g experts of the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from moedisco_ray.models.checks import check_complete
from moedisco_ray.models.families import Role
from moedisco_ray.models.layout import ModelMap


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
