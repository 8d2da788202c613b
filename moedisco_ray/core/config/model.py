"""The sizes of the model, without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from moedisco_ray.core.config.base import LARGEST, MOST_EXPERTS, Section
from moedisco_ray.core.config.effects import Resolved
from moedisco_ray.core.config.extent import MOST_ENTRIES
from moedisco_ray.core.config.inits import CheckpointInit, LocalInit, UpcycleInit
from moedisco_ray.core.config.rope import checked_scaling, read_scaling
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import DECLARATIONS, REFUSED, Family, FamilyName, Router, language_model, unsupported
from moedisco_ray.core.read_roots import opened

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the configuration field with the number of routed experts, in any family; transformers reads and writes
several."""
MOST_LAYERS = 4096
_LEAST_EXPERT = 8
LARGEST_DIMENSION = 2**26
"""Maximum dimension of a tensor, so that a plan's numbers stay bounded."""
LARGEST_CONFIG_BYTES = 1 << 20
"""Maximum size of a model's `config.json` (bytes); published ones have a few thousand."""
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
    moe_intermediate_size: int = Field(512, ge=_LEAST_EXPERT, le=LARGEST_DIMENSION)
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


_RANDOM_FAMILY = "qwen3_moe"
"""Family of a model with random weights, unless `model.family` names another one."""


class Model(Section):
    """The Mixture-of-Experts to train."""

    family: Annotated[FamilyName | None, Resolved("family")] = None
    """Model family. Null means the family in the `config.json` of the model that `init` names, or, for random weights,
    qwen3_moe. A dense model becomes the first of its relatives: Llama and Mistral become mixtral (Llama with biases:
    qwen2_moe), Qwen2 becomes qwen2_moe, Qwen3 becomes qwen3_moe, OLMo-2 becomes flex_olmo, ERNIE 4.5 becomes
    ernie4_5_moe, and Granite becomes granitemoe."""
    config: Architecture | None = None
    """Sizes of the model. Leave them out if `init` names a directory, which has its own."""
    init: Literal["random"] | CheckpointInit | UpcycleInit = "random"

    @model_validator(mode="after")
    def _one_source_of_sizes(self) -> Self:
        if isinstance(self.init, LocalInit) and self.config is not None:
            raise ValueError(
                f"model.config and {self.init.setting} exclude each other: the checkpoint has its own sizes; remove "
                "model.config"
            )
        if self.config is not None:
            family = DECLARATIONS[self.family or _RANDOM_FAMILY]
            _check_sizes(self.config, family)
            normalised = family.router.normalised(self.config.norm_topk_prob)
            # the default; what is stored must be valid when it is read again
            if normalised != self.config.norm_topk_prob:
                object.__setattr__(self, "config", self.config.model_copy(update={"norm_topk_prob": normalised}))
        return self

    @property
    def family_name(self) -> FamilyName:
        """`family` with its default resolved.

        Raises:
            CheckpointError: The directory that `init` names holds no model that a family can start from.
        """
        if self.family is not None:
            return self.family
        return _family_of(self.init) if isinstance(self.init, LocalInit) else _RANDOM_FAMILY

    @property
    def architecture(self) -> Architecture:
        """Sizes of the model, from `config` or from the `config.json` of the directory that `init` names.

        Raises:
            CheckpointError: The directory holds no model that this family can start from.
        """
        if isinstance(self.init, CheckpointInit):
            return read_architecture(self.init.directory, self.family_name)
        if isinstance(self.init, UpcycleInit):
            return read_dense_architecture(self.init, self.family_name)
        sizes = self.config or Architecture()
        return sizes.model_copy(
            update={"norm_topk_prob": DECLARATIONS[self.family_name].router.normalised(sizes.norm_topk_prob)}
        )

    @property
    def experts_together(self) -> int:
        """Number of neighbouring experts that a sub-model keeps together: they are parts of one MLP of the start."""
        return self.init.split if isinstance(self.init, UpcycleInit) else 1


def _check_sizes(sizes: Architecture, family: Family) -> None:
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
    _check_positions_and_top_k(sizes, family)


def _check_positions_and_top_k(sizes: Architecture, family: Family) -> None:
    family.check_scaling(sizes.rope_scaling)
    try:
        family.router.check_top_k(sizes.num_experts_per_tok, sizes.num_experts)
    except ValueError as error:
        raise ValueError(f"num_experts_per_tok {sizes.num_experts_per_tok} {error}") from error


def _family_of(start: LocalInit) -> FamilyName:
    """The family of the MoE that a start model is or becomes.

    Raises:
        CheckpointError: The `config.json` cannot be read, or its model is, or becomes, none of a declared family.
    """
    directory = start.directory
    raw = _read(start.setting, directory)
    if "model_type" not in raw:
        raise CheckpointError(
            start.setting, str(start.place), "has a config.json without model_type; name a Hugging Face model"
        )
    kind = str(raw["model_type"])
    if kind in DECLARATIONS:
        return kind
    takers = [family for family in DECLARATIONS.values() if kind in family.dense]
    if takers and not isinstance(start, UpcycleInit):
        raise CheckpointError(
            start.setting, str(start.place), f"holds a dense model of {kind!r}; use model.init.upcycle"
        )
    if not takers:
        raise CheckpointError(start.setting, str(start.place), f"holds a model of {kind!r}, which {unsupported(kind)}")
    biased = bool(raw.get("attention_bias"))
    return next((family for family in takers if not biased or family.has_biases(raw)), takers[0]).name


def read_architecture(directory: Path, family: FamilyName) -> Architecture:
    """The sizes of a Hugging Face MoE directory.

    Raises:
        CheckpointError: The `config.json` cannot be read, names another family, or has a size out of bounds.
    """
    raw = _read("model.init.checkpoint", directory)
    kind = raw.get("model_type")
    if kind not in DECLARATIONS:
        raise CheckpointError(
            "model.init.checkpoint", str(directory), f"holds a model of family {kind!r}, which {unsupported(kind)}"
        )
    if kind != family:
        raise CheckpointError(
            "model.init.checkpoint",
            str(directory),
            f"holds a model of family {kind!r}, but model.family is {family!r}; leave model.family out",
        )
    return _sizes("model.init.checkpoint", directory, raw, family)


def read_dense_architecture(start: UpcycleInit, family: FamilyName) -> Architecture:
    """The sizes of the MoE that a dense model, or a model with one expert, is upcycled into.

    Raises:
        CheckpointError: The `config.json` cannot be read, or its model cannot become one of this family.
    """
    directory = start.directory
    raw = _read(start.setting, directory)
    kind = raw.get("model_type")
    declaration = DECLARATIONS[family]
    if not (kind in declaration.dense or (kind == family and _experts(raw) == 1)):
        if kind in REFUSED:
            raise CheckpointError(
                start.setting, str(start.upcycle), f"holds a model of {kind!r}, which {unsupported(kind)}"
            )
        what = f"{_experts(raw)} experts of {kind!r}" if _experts(raw) else f"a model of {kind!r}"
        starts = " or ".join([*declaration.dense, f"{family} with one expert"])
        takers = [taker.name for taker in DECLARATIONS.values() if kind in taker.dense]
        hint = f"; set model.family to {' or '.join(takers)}" if takers else ""
        raise CheckpointError(
            start.setting, str(start.upcycle), f"holds {what}; {family} is upcycled from {starts}{hint}"
        )
    if declaration.router.only_top_k is not None:
        raise CheckpointError(
            start.setting,
            str(start.upcycle),
            f"cannot be upcycled: the weights of a token's experts in {family} do not sum to 1, so that copies of an "
            "expert would not compute what it does; start from a checkpoint with all experts",
        )
    if kind != family and raw.get("use_sliding_window"):
        raise CheckpointError(
            start.setting,
            str(start.upcycle),
            f"has use_sliding_window, with which {kind} and {family} do not attend alike; use another model",
        )
    sizes = _sizes(
        start.setting,
        directory,
        raw if kind == family else {**raw, **declaration.fields_of_dense(raw)},
        family,
        num_experts=start.num_experts,
        num_experts_per_tok=start.num_experts_per_tok,
        norm_topk_prob=declaration.router.normalises != "never",
    )
    if not sizes.norm_topk_prob and sizes.num_experts_per_tok < sizes.num_experts:
        raise CheckpointError(
            f"{start.setting.rpartition('.')[0]}.num_experts_per_tok",
            sizes.num_experts_per_tok,
            f"changes what the model computes, because {family} never normalises router weights, and those of "
            f"{sizes.num_experts_per_tok} of {sizes.num_experts} equal experts sum to less than 1; set it to "
            "num_experts",
        )
    heads = sizes.head_size * sizes.num_attention_heads
    if kind != family and not declaration.attention.own_head_dim and heads != sizes.hidden_size:
        raise CheckpointError(
            start.setting,
            str(start.upcycle),
            f"has head_dim {sizes.head_dim}, but {family} has heads of hidden_size / num_attention_heads; use a family "
            "with head_dim",
        )
    return sizes if start.split == 1 else _divided(sizes, start, declaration)


def _divided(sizes: Architecture, start: UpcycleInit, family: Family) -> Architecture:
    """The sizes with experts of 1 / `split` of the hidden units; a shared expert keeps its size."""
    hidden, split, shared = sizes.moe_intermediate_size, start.split, family.shared
    if hidden % split or hidden // split < _LEAST_EXPERT:
        raise CheckpointError(
            f"{start.setting.rpartition('.')[0]}.split",
            split,
            f"does not divide the MLP's {hidden} hidden units into experts of {_LEAST_EXPERT} or more; use a divisor "
            f"of {hidden}",
        )
    update: dict[str, Any] = {"moe_intermediate_size": hidden // split}
    if shared is not None and shared.count_field is not None:
        count = split * int(family.value(sizes.fields, shared.count_field))
        update["fields"] = {**sizes.fields, shared.count_field: count}
    elif shared is not None:
        update["shared_expert_intermediate_size"] = sizes.shared_expert_intermediate_size or hidden
    return sizes.model_copy(update=update)


def _read(setting: str, directory: Path) -> dict[str, Any]:
    try:
        raw: Any = json.loads(_text(directory / "config.json"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(setting, str(directory), f"no readable config.json there ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(setting, str(directory), "no readable config.json there (it holds no JSON object)")
    return language_model(raw)


def _text(path: Path) -> str:
    with opened(path) as found:
        if found.stat().st_size > LARGEST_CONFIG_BYTES:
            raise ValueError(f"it has more than {LARGEST_CONFIG_BYTES:,} bytes")
        return found.read_text(encoding="utf-8")


def _experts(raw: Mapping[str, Any]) -> int | None:
    found: int | None = next((raw[name] for name in EXPERT_COUNTS if raw.get(name) is not None), None)
    return found


def _sizes(setting: str, directory: Path, raw: Mapping[str, Any], family: FamilyName, **changes: Any) -> Architecture:
    declaration, kind = DECLARATIONS[family], raw.get("model_type")
    raw = {**declaration.unsaid, **raw} if kind == family else raw
    size = declaration.expert_size(raw, _experts(raw)) if kind == family else raw.get("intermediate_size")
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(setting, str(directory), "its config.json cannot be used: rope_scaling must be an object")
    found = {name: raw[name] for name in Architecture.model_fields if raw.get(name) is not None}
    found.update(
        num_experts=_experts(raw),
        moe_intermediate_size=size,
        norm_topk_prob=declaration.router.normalised(raw.get("norm_topk_prob", False)),
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10_000.0)),
        rope_scaling=read_scaling(rope),
    )
    if (top_k := raw.get(declaration.router.top_k_field)) is not None:
        found["num_experts_per_tok"] = top_k
    try:
        found["fields"] = declaration.read_fields(raw)
        sizes = Architecture.model_validate(found | changes)
        declaration.check_choices(sizes.fields, sizes.num_hidden_layers)
        _check_positions_and_top_k(sizes, declaration)
    except ValidationError as error:
        mistake = error.errors()[0]
        where = ".".join(map(str, mistake["loc"]))
        raise CheckpointError(
            setting, str(directory), f"its config.json cannot be used: {where} {plain_words(mistake)}"
        ) from error
    except ValueError as error:
        raise CheckpointError(setting, str(directory), f"its config.json cannot be used: {error}") from error
    return sizes
