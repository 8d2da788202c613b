"""Family and sizes of the model that a run starts from, read from its `config.json` without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moedisco_ray.core.config.architecture import LEAST_EXPERT, Architecture, check_positions_and_top_k
from moedisco_ray.core.config.inits import LocalInit, UpcycleInit
from moedisco_ray.core.config.model import Model
from moedisco_ray.core.config.rope import read_scaling
from moedisco_ray.core.config.start_files import start_directory
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.families import DECLARATIONS, REFUSED, Family, FamilyName, language_model, unsupported
from moedisco_ray.core.families.quantisation import quantisation
from moedisco_ray.core.store.read_roots import opened

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names of the configuration field with the number of routed experts, in any family; transformers reads and writes
several."""
LARGEST_CONFIG_BYTES = 1 << 20
"""Maximum size of a model's `config.json` (bytes); published ones have a few thousand."""


def with_start(model: Model) -> Model:
    """The section `model` with the family and the sizes of the model that `init` names.

    Raises:
        CheckpointError: The directory holds no model that the family can start from.
        ConfigError: `model.config` has other sizes than the model.
    """
    init = model.init
    if not isinstance(init, LocalInit):
        return model
    family = model.family or family_of(init)
    sizes = (
        read_dense_architecture(init, family)
        if isinstance(init, UpcycleInit)
        else read_architecture(start_directory(init), family)
    )
    if model.config not in (None, sizes):
        raise ConfigError(
            "model.config", None, f"differs from the sizes of {init.setting} {str(init.place)!r}; remove model.config"
        )
    return model.model_copy(update={"family": family, "config": sizes})


def holds_experts(start: LocalInit) -> bool:
    """Whether a start model is a Mixture-of-Experts model, whatever its family.

    Raises:
        CheckpointError: The `config.json` cannot be read.
    """
    return (_experts(_read(start.setting, start_directory(start))) or 0) > 1


def family_of(start: LocalInit) -> FamilyName:
    """The family of the MoE that a start model is or becomes.

    Raises:
        CheckpointError: The `config.json` cannot be read, or its model is, or becomes, none of a declared family.
    """
    directory = start_directory(start)
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
    directory = start_directory(start)
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
    if hidden % split or hidden // split < LEAST_EXPERT:
        raise CheckpointError(
            f"{start.setting.rpartition('.')[0]}.split",
            split,
            f"does not divide the MLP's {hidden} hidden units into experts of {LEAST_EXPERT} or more; use a divisor "
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
    values = language_model(raw)
    quantisation(values, setting, str(directory))
    return values


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
        if declaration.attention.latent and raw.get("hidden_size", 0) % (raw.get("num_attention_heads") or 1):
            found["head_dim"] = declaration.value(found["fields"], "v_head_dim")  # such heads have sizes of their own
        sizes = Architecture.model_validate(found | changes)
        declaration.check_choices(sizes.fields, sizes.num_hidden_layers)
        check_positions_and_top_k(sizes, declaration)
    except ValidationError as error:
        mistake = error.errors()[0]
        where = ".".join(map(str, mistake["loc"]))
        raise CheckpointError(
            setting, str(directory), f"its config.json cannot be used: {where} {plain_words(mistake)}"
        ) from error
    except ValueError as error:
        raise CheckpointError(setting, str(directory), f"its config.json cannot be used: {error}") from error
    return sizes
