"""The role of every tensor of a model, from its name and the declaration of the model's family.

The canonical form of a model is the family's original checkpoint: one tensor per expert and projection, or, in families
that declare `stacks`, tensors that hold all experts of a layer. Decompose, merge, training and export all read these
roles.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable

from moedisco_ray.core.families import Family


class Role(enum.StrEnum):
    """The role of a tensor in the model."""

    EXPERT = "expert"
    ROUTER = "router"
    SHARED_EXPERT = "shared_expert"
    BACKBONE = "backbone"


@dataclasses.dataclass(frozen=True)
class TensorRole:
    """The role and position of a tensor in the model.

    Attributes:
        layer: Index of the decoder layer; None outside the layers.
        expert: Index of the expert; None for other roles, and for a stack of all experts.
        part: `gate`, `up` or `down` for an expert; else the name inside the layer or the model.
        expert_axis: The axis that counts the experts of the layer, in routers and stacks of experts; None for other
            tensors.
    """

    role: Role
    layer: int | None
    expert: int | None
    part: str
    expert_axis: int | None = None


OUTSIDE_LAYERS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
"""Backbone tensors outside the decoder layers, for every family; see also `Family.outside`."""


def layer_rules(family: Family) -> tuple[tuple[Role, re.Pattern[str]], ...]:
    """Role and name pattern of every tensor in a decoder layer.

    The pattern of a single expert has two groups: `expert`, its index, and `projection`, the name of the projection.
    """
    form = re.escape(f"{family.block}.{family.expert_name}")
    experts = form.replace(r"\{expert\}", r"(?P<expert>\d+)").replace(
        r"\{projection\}", f"(?P<projection>{'|'.join(family.projections)})"
    )
    if family.stacks:
        experts = _any_of(family, [f"experts.{name}" for name in family.stacks])
    rules = [
        (Role.EXPERT, experts),
        (Role.ROUTER, _any_of(family, map(family.router.in_block, family.router.tensors))),
        *((Role.BACKBONE, pattern) for pattern in family.backbone),
    ]
    if family.recurrence is not None:
        rules.append((Role.BACKBONE, family.recurrence.pattern))
    if family.shared is not None:
        rules.append((Role.SHARED_EXPERT, family.shared.pattern))
    return tuple((role, re.compile(pattern)) for role, pattern in rules)


def _any_of(family: Family, names: Iterable[str]) -> str:
    """Pattern of some tensors of the MoE block, by their names in memory."""
    return "|".join(re.escape(family.in_checkpoint(name)) for name in names)
