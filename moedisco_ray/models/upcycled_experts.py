"""Experts that are no mere copies of the MLP they are upcycled from: parts of it, or with some hidden units drawn anew.

A hidden unit of an expert is one row of its gate and up projections and one column of its down projection. Families
that store experts in stacks have these rows and columns at other places; `_unit_axis` says where.

Shapes: E experts, F expert hidden, M matrices in one tensor (2 for gate and up in one, else 1), X weights of a unit in
a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from moedisco_ray.core.families import Family
from moedisco_ray.models.initial_weights import key_seed
from moedisco_ray.models.layout import ModelMap
from moedisco_ray.models.roles import Role, TensorRole


class ChangedTensors(Mapping[str, Tensor]):
    """Canonical tensors of a model, each changed by a function on access.

    Args:
        tensors: Canonical tensors.
        model_map: Tensor names of the family.
        change: Returns the changed tensor, from its role and the tensor, which it must not write to.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], model_map: ModelMap, change: Callable[[TensorRole, Tensor], Tensor]
    ) -> None:
        self._tensors, self._map, self._change = tensors, model_map, change

    def __getitem__(self, key: str) -> Tensor:
        return self._change(self._map.classify(key), self._tensors[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def split_experts(
    tensors: Mapping[str, Tensor], model_map: ModelMap, parts: int, *, whole_groups: bool
) -> ChangedTensors:
    """Divide copies of an MLP: each expert keeps 1 / `parts` of the hidden units (LLaMA-MoE, arXiv 2406.16554).

    Expert e keeps part e mod `parts`, so every group of `parts` neighbours holds the whole MLP. Down projections are
    multiplied by `parts`: at a weight of 1 / `parts` each, the experts of a group add up to the MLP. Parts are
    neighbouring units, which is as good as a random choice, because training treats all units of an MLP alike.

    Args:
        tensors: Canonical tensors of the MoE, with whole copies.
        model_map: Tensor names of the family.
        parts: Number of parts; divides the number of experts and of hidden units.
        whole_groups: Whether the experts of a group have equal router rows, so that a token selects them together, at
            equal weights (virtual groups, arXiv 2410.07524).
    """

    def part(role: TensorRole, w: Tensor, expert: int) -> Tensor:
        found = _unit_axis(model_map.family, role.part)
        if found is None:
            return w
        axis, before, after = found
        units = torch.unflatten(w, axis, (before, -1, after))
        size = units.shape[axis + 1] // parts
        taken = units.narrow(axis + 1, expert % parts * size, size).flatten(axis, axis + 2)
        return taken * parts if _name(model_map.family, role.part).startswith("down") else taken.clone()

    def change(role: TensorRole, tensor: Tensor) -> Tensor:
        if role.role is Role.ROUTER and role.expert_axis is not None and whole_groups:
            first_E = torch.arange(tensor.shape[role.expert_axis]) // parts * parts
            return tensor.index_select(role.expert_axis, first_E)
        if role.role is not Role.EXPERT:
            return tensor
        return (
            torch.stack([part(role, w, e) for e, w in enumerate(tensor)])
            if role.expert is None
            else part(role, tensor, role.expert)
        )

    return ChangedTensors(tensors, model_map, change)


def with_new_units(tensors: Mapping[str, Tensor], model_map: ModelMap, share: float, seed: int) -> ChangedTensors:
    """Draw a share of each expert's hidden units anew (Drop-Upcycling, arXiv 2502.19261).

    All other weights keep their bits.

    New weights have a normal distribution with the mean and the standard deviation of those that they replace, per
    matrix.

    Args:
        tensors: Canonical tensors of the MoE.
        model_map: Tensor names of the family.
        share: Share of the hidden units, at least one. Each expert has units of its own, the same ones in all of its
            matrices.
        seed: Seed; the same seed and tensors give the same bits.
    """

    def change(role: TensorRole, tensor: Tensor) -> Tensor:
        if role.role is not Role.EXPERT:
            return tensor
        found = tensor.clone()
        for expert, w in enumerate(found) if role.expert is None else [(role.expert, found)]:
            for number, w_FX in enumerate(_matrices(model_map.family, role.part, w)):
                name = f"{role.layer}.{expert}"
                order_F = torch.randperm(len(w_FX), generator=torch.Generator().manual_seed(key_seed(seed, name)))
                new_N = order_F[: max(1, round(share * len(w_FX)))]
                old_NX = w_FX[new_N].double()
                generator = torch.Generator().manual_seed(key_seed(seed, f"{name}.{role.part}.{number}"))
                drawn_NX = (
                    torch.empty(old_NX.shape).normal_(generator=generator) * old_NX.std(correction=0) + old_NX.mean()
                )
                w_FX[new_N] = drawn_NX.to(w_FX.dtype)
        return found

    return ChangedTensors(tensors, model_map, change)


def _matrices(family: Family, part: str, w: Tensor) -> Iterator[Tensor]:
    """Views of the matrices in an expert's tensor, hidden units first.

    The output's bias has none, because it belongs to no unit.
    """
    found = _unit_axis(family, part)
    if found is not None:
        axis, before, after = found
        w_MFX = (
            torch.unflatten(w, axis, (before, -1, after)).movedim((axis, axis + 2, axis + 1), (0, 1, 2)).flatten(0, 1)
        )
        yield from w_MFX


def _unit_axis(family: Family, part: str) -> tuple[int, int, int] | None:
    """The axis of an expert's tensor that counts hidden units, and the number of matrices whose units it counts.

    The units of several matrices follow each other on the axis, or alternate.

    Returns:
        The axis, and two factors of the number of matrices: of those one after the other, and of those that alternate.
        None: the tensor is the bias of the output.
    """
    name = _name(family, part)
    if name == "down_proj_bias":
        return None
    if not family.stacks or name == "down_proj":
        return int(name.startswith("down") and not family.interleaved), 1, 1
    return (int(not name.endswith("_bias")), 1, 2) if family.interleaved else (0, 2, 1)


def _name(family: Family, part: str) -> str:
    """Name of an expert's tensor: its part, or the name of the stack in memory."""
    return next((name for name in family.stacks if family.in_checkpoint(f"experts.{name}") == part), part)
