"""One declaration per model family: the role of every tensor, and the configuration fields of the experts.

The canonical form of a model is the family's original checkpoint, with one tensor per expert and projection. Decompose, merge,
training and export all read these declarations.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Literal

from moedisco_ray.core.config import FamilyName

Part = Literal["gate", "up", "down"]
PARTS: tuple[Part, ...] = ("gate", "up", "down")


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
        expert: Index of the expert; None for other roles.
        part: For an expert, the projection: `gate`, `up` or `down`. For other roles, the tensor's name, without the prefix of its
            layer if it is in one.
    """

    role: Role
    layer: int | None
    expert: int | None
    part: str


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: The Hugging Face `model_type`.
        block: Name of the MoE block in a checkpoint; models in memory call it `mlp`.
        projections: Checkpoint names of an expert's gate, up and down projection.
        num_experts_field: Configuration field with the number of routed experts.
        expert_size_field: Configuration field with an expert's hidden size.
        always_normalises: Whether the weights of the selected experts sum to one regardless of the configuration.
        shared: Regular expression of the shared expert's tensors, relative to the layer.
        backbone: Regular expressions of the backbone's tensors, relative to the layer.
    """

    name: FamilyName
    block: str
    projections: tuple[str, str, str]
    num_experts_field: str
    expert_size_field: str
    always_normalises: bool
    shared: str | None
    backbone: tuple[str, ...]

    def projection(self, part: Part) -> str:
        """Name of a projection of an expert in a checkpoint."""
        return self.projections[PARTS.index(part)]


_NORMS = r"(input|post_attention)_layernorm\.weight"
_ATTENTION = r"self_attn\.[qkvo]_proj\.weight"
_ATTENTION_BIAS = r"self_attn\.[qkvo]_proj\.bias"
_QK_NORM = r"self_attn\.[qk]_norm\.weight"
_DENSE_MLP = r"mlp\.(gate|up|down)_proj\.weight"   # in layers that the configuration makes dense
_SHARED_EXPERT = r"mlp\.shared_expert(\.(gate|up|down)_proj|_gate)\.weight"
_QWEN = ("gate_proj", "up_proj", "down_proj")

OUTSIDE_LAYERS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
"""Backbone tensors outside the decoder layers, for every family."""

DECLARATIONS: dict[FamilyName, Family] = {family.name: family for family in (
    Family("mixtral", block="block_sparse_moe", projections=("w1", "w3", "w2"), num_experts_field="num_local_experts",
           expert_size_field="intermediate_size", always_normalises=True, shared=None, backbone=(_NORMS, _ATTENTION)),
    Family("qwen2_moe", block="mlp", projections=_QWEN, num_experts_field="num_experts",
           expert_size_field="moe_intermediate_size", always_normalises=False, shared=_SHARED_EXPERT,
           backbone=(_NORMS, _ATTENTION, _ATTENTION_BIAS, _DENSE_MLP)),
    Family("qwen3_moe", block="mlp", projections=_QWEN, num_experts_field="num_experts",
           expert_size_field="moe_intermediate_size", always_normalises=False, shared=None,
           backbone=(_NORMS, _ATTENTION, _ATTENTION_BIAS, _QK_NORM, _DENSE_MLP)),
    Family("olmoe", block="mlp", projections=_QWEN, num_experts_field="num_experts",
           expert_size_field="intermediate_size", always_normalises=False, shared=None,
           backbone=(_NORMS, _ATTENTION, _ATTENTION_BIAS, _QK_NORM)),
)}


def layer_rules(family: Family) -> tuple[tuple[Role, re.Pattern[str]], ...]:
    """Role and name pattern of every tensor in a decoder layer.

    The pattern of an expert has two groups: the expert's index, and the name of the projection.
    """
    block, names = re.escape(family.block), "|".join(family.projections)
    rules = [
        (Role.EXPERT, rf"{block}\.experts\.(\d+)\.({names})\.weight"),
        (Role.ROUTER, rf"{block}\.gate\.weight"),
        *((Role.BACKBONE, pattern) for pattern in family.backbone),
    ]
    if family.shared is not None:
        rules.append((Role.SHARED_EXPERT, family.shared))
    return tuple((role, re.compile(pattern)) for role, pattern in rules)
