"""Models with the same experts in another order: in memory, as a view of tensors, and as a stream of them.

A model computes the same in every order of the experts of a layer, if their router rows and biases are in that order.

Shapes: E experts.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moedisco_ray.models.layout import ModelMap

Order = Mapping[int, Sequence[int]]
"""Per MoE layer, the expert at each of E places, as its index in the other order."""


def inverted(order: Order) -> dict[int, list[int]]:
    """The order that undoes another one: per layer, the place of each expert."""
    return {layer: sorted(range(len(experts)), key=experts.__getitem__) for layer, experts in order.items()}


def source_name(key: str, names: ModelMap, order: Order) -> str:
    """Name in the other order of the tensor with this name; tensors that belong to no single expert keep theirs."""
    role = names.classify(key)
    if role.layer is None or role.expert is None or role.layer not in order:
        return key
    return names.renumbered(key, order[role.layer][role.expert])


class Reordered(Mapping[str, Tensor]):
    """Canonical tensors of a model with its experts in another order; they are read or copied on access.

    Args:
        tensors: The tensors in the given order.
        names: Names of the tensors.
        order: The expert of `tensors` at each place; layers that it leaves out keep their order.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: ModelMap, order: Order) -> None:
        self._tensors, self._names, self._order = tensors, names, order

    def __getitem__(self, key: str) -> Tensor:
        role = self._names.classify(key)
        if role.layer is None or role.layer not in self._order or role.expert_axis is None:
            return self._tensors[source_name(key, self._names, self._order)]
        return self._tensors[key].index_select(role.expert_axis, torch.tensor(self._order[role.layer]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def reordered_by_layer(
    tensors: Iterable[tuple[str, Tensor]], names: ModelMap, order: Order, keys: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Like `Reordered`, for a stream of tensors, layer by layer; one layer waits in memory.

    Args:
        tensors: Canonical tensors in the given order; those of a layer follow each other.
        names: Names of the tensors.
        order: The expert of the given order at each place.
        keys: Names of all tensors of the model.
    """
    counts = collections.Counter(names.classify(key).layer for key in keys)
    waiting: dict[str, Tensor] = {}
    for key, tensor in tensors:
        layer = names.classify(key).layer
        if layer not in order:
            yield key, tensor
            continue
        waiting[key] = tensor
        # A layer leaves when its last tensor has come: the next one may be computed with a whole layer in memory.
        if len(waiting) == counts[layer]:
            yield from Reordered(waiting, names, order).items()
            waiting.clear()
