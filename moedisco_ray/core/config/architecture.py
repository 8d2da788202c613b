"""The sizes of a model, and which of them a family can have."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from moedisco_ray.core.config.base import LARGEST, MOST_EXPERTS, Section
from moedisco_ray.core.config.extent import MOST_ENTRIES
from moedisco_ray.core.config.rope import checked_scaling
from moedisco_ray.core.families import Family, Router

MOST_LAYERS = 4096
LEAST_EXPERT = 8
LARGEST_DIMENSION = 2**26
"""Maximum dimension of a tensor, so that a plan's numbers stay bounded."""
FieldName = Annotated[str, Field(max_length=64)]
Whole = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
ScalingValue = bool | Whole | float | FieldName | Annotated[list[Whole | float], Field(max_length=MOST_ENTRIES)] | None
"""A value of `model.config.rope_scaling`; `longrope` has lists with a number for every second element of a head."""
FieldValue = bool | Whole | float | str | None
"""A value of `model.config.fields`; see `families.Value`."""


class Architecture(Section):
    """Sizes of a decoder with Mixture-of-Experts layers."""

    hidden_size: int = Field(256, ge=8, le=LARGEST_DIMENSION)
    num_hidden_layers: int = Field(4, ge=1, le=MOST_LAYERS)
    num_attention_heads: int = Field(4, ge=1, le=LARGEST_DIMENSION)
    num_key_value_heads: int | None = Field(None, ge=1, le=LARGEST_DIMENSION)
    """Number of key and value heads (grouped-query attention). Null means the number of attention heads."""
    head_dim: int | None = Field(None, ge=2, le=LARGEST_DIMENSION)
    """Size of one head. Null means hidden_size / num_attention_heads. Only some families allow another value."""
    moe_intermediate_size: int = Field(512, ge=LEAST_EXPERT, le=LARGEST_DIMENSION)
    """Hidden size of one expert (some families call it intermediate_size)."""
    shared_expert_intermediate_size: int | None = Field(None, ge=8, le=LARGEST_DIMENSION)
    """Hidden size of the shared expert of qwen2_moe, qwen3_next and qwen3_5_moe_text. Null means the hidden size of a
    routed expert."""
    num_experts: int = Field(4, ge=1, le=MOST_EXPERTS)
    num_experts_per_tok: int = Field(2, ge=1, le=MOST_EXPERTS)
    norm_topk_prob: bool = True
    """Whether the router weights of a token's selected experts are scaled to sum to one, as Mixtral always does. If
    they are, the merge keeps the output scale of each sub-model; otherwise the merge rescales the experts."""
    vocab_size: int | None = Field(None, ge=8, le=LARGEST_DIMENSION)
    """Number of rows of the embedding. Null means the number of tokens in the tokenizer."""
    max_position_embeddings: int | None = Field(None, ge=8, le=LARGEST)
    """Maximum sequence length (tokens). Null means corpus.sequence_length."""
    tie_word_embeddings: bool = False
    rope_theta: float = Field(10_000.0, gt=0)
    rope_scaling: dict[FieldName, ScalingValue] | None = Field(None, max_length=32)
    """Scaling of rotary positions for longer texts, as in `config.json`: `rope_type` (linear, dynamic, yarn, longrope,
    llama3, proportional) and its parameters. Null means no scaling."""
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.02, gt=0)
    fields: dict[FieldName, FieldValue] = Field(default_factory=dict, max_length=32)
    """Fields of `config.json` that only this family has, such as `kv_lora_rank` of deepseek_v3. Left out: the family's
    default for small models."""

    def router_fields(self, router: Router) -> dict[str, Any]:
        return self.fields | {router.top_k_field: self.num_experts_per_tok, "norm_topk_prob": self.norm_topk_prob}

    @property
    def key_value_heads(self) -> int:
        """`num_key_value_heads` with its default resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """`head_dim` with its default resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @field_validator("rope_scaling", mode="before")
    @classmethod
    def _scaling_is_complete(cls, scaling: Any, info: ValidationInfo) -> Any:
        if not isinstance(scaling, dict):
            return scaling  # the validation of its type handles it
        hidden, heads, head = (info.data.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
        return checked_scaling(scaling, head or (hidden // heads if hidden and heads else None))

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.key_value_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"a head of {self.head_size} is odd; rotary positions need an even one")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        return self


def check_sizes(sizes: Architecture, family: Family) -> None:
    """Check that a family can have these sizes.

    Raises:
        ValueError: It cannot.
    """
    name, attention = family.name, family.attention
    if sizes.shared_expert_intermediate_size is not None and (
        family.shared is None or family.shared.size_field is None
    ):
        other = f"{name} has no shared expert" if family.shared is None else f"set fields.{family.shared.count_field}"
        raise ValueError(
            f"shared_expert_intermediate_size belongs to qwen2_moe, qwen3_next and qwen3_5_moe_text; {other}"
        )
    if sizes.head_dim is not None and not attention.own_head_dim:
        what = "fields such as qk_rope_head_dim" if attention.latent else "heads of hidden_size / num_attention_heads"
        raise ValueError(f"head_dim: {name} has {what}; remove it")
    if attention.latent and sizes.key_value_heads != sizes.num_attention_heads:
        raise ValueError(
            f"num_key_value_heads {sizes.key_value_heads}: every head of {name} has its own keys; remove it"
        )
    if (
        "norm_topk_prob" in sizes.model_fields_set
        and family.router.normalised(sizes.norm_topk_prob) != sizes.norm_topk_prob
    ):
        raise ValueError(
            f"norm_topk_prob {str(sizes.norm_topk_prob).lower()}: {name} {family.router.normalises} normalises its "
            "router weights; remove the setting"
        )
    if unknown := sorted(sizes.fields.keys() - family.fields.keys()):
        own = f"it has {', '.join(family.fields)}" if family.fields else "it has none of its own; remove it"
        raise ValueError(f"fields.{unknown[0]}: {name} has no such field; {own}")
    for key, value in sizes.fields.items():
        default = family.fields[key]
        if (
            value is not None
            and default is not None
            and isinstance(value, str | bool) != isinstance(default, str | bool)
        ):
            raise ValueError(f"fields.{key} {value!r} must be {type(default).__name__}, such as {default!r}")
    family.check_choices(sizes.fields, sizes.num_hidden_layers)
    check_positions_and_top_k(sizes, family)


def check_positions_and_top_k(sizes: Architecture, family: Family) -> None:
    family.check_scaling(sizes.rope_scaling)
    try:
        family.router.check_top_k(sizes.num_experts_per_tok, sizes.num_experts)
    except ValueError as error:
        raise ValueError(f"num_experts_per_tok {sizes.num_experts_per_tok} {error}") from error
