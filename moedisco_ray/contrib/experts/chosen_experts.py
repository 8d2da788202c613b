"""Build an MoE from chosen experts of MoEs of one architecture: fewer experts, others, or more.

The router scores each expert by a row of its own. So an expert brings its rows with it, and the others keep their
scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moedisco_ray.core.config import EXPERT_COUNTS
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models.hf import from_values
from moedisco_ray.models.layout import ModelMap


class Chosen(NamedTuple):
    """An expert of one of the models, in every layer."""

    model: int
    expert: int


def with_experts(
    models: Sequence[Mapping[str, Tensor]], model_map: ModelMap, chosen: Sequence[Chosen]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an MoE whose layers have these experts, in this order; everything else is the first model's.

    Experts of other models are converted to the first model's dtype.

    Args:
        models: Canonical tensors of each model.
        model_map: Tensor names of the family.
        chosen: The experts.
    """
    first = models[0]
    for key in first:
        role, dtype = model_map.classify(key), first[key].dtype
        if role.expert_axis is not None:
            stacks = {each.model: models[each.model][key] for each in chosen}
            rows = [stacks[each.model].select(role.expert_axis, each.expert).to(dtype) for each in chosen]
            yield key, torch.stack(rows, dim=role.expert_axis)
        elif role.expert is None:
            yield key, first[key]
        elif role.expert == 0:
            for number, each in enumerate(chosen):
                tensor = models[each.model][model_map.renumbered(key, each.expert)].to(dtype)
                # safetensors refuses to write the same memory twice.
                yield model_map.renumbered(key, number), tensor.clone() if each in chosen[:number] else tensor


def config_with_experts(config: Mapping[str, Any], experts: int, top_k: int | None) -> dict[str, Any]:
    """The `config.json` values of a model with another number of experts.

    Args:
        config: Values of the model.
        experts: Number of experts.
        top_k: Experts per token; None: as before, but at most all experts.

    Raises:
        ConfigError: The router cannot have this number of experts or this top-k.
    """
    family = ModelMap(str(config.get("model_type"))).family
    described = from_values(config)
    whole = described.to_dict()
    if experts < family.router.least_in_group:
        least = family.router.least_in_group
        raise ConfigError("EXPERTS", experts, f"is too few for the router of {family.name}; choose at least {least}")
    groups = family.router.groups(whole)
    if groups is not None and groups[0] > 1:
        raise ConfigError(
            "EXPERTS",
            experts,
            f"of a model whose router selects among {groups[0]} groups of experts cannot be chosen one by one",
        )
    if top_k is not None and top_k > experts:
        raise ConfigError("--top-k", top_k, f"exceeds the number of experts, {experts}; lower it")
    kept = min(int(whole[family.router.top_k_field]), experts) if top_k is None else top_k
    try:
        family.router.check_top_k(kept, experts)
    except ValueError as error:
        raise ConfigError("--top-k", kept, str(error)) from error
    values = {key: value for key, value in config.items() if key not in EXPERT_COUNTS}
    # The configuration of gpt-oss has the top-k under a second name.
    second = {"experts_per_token": kept} if "experts_per_token" in values else {}
    size = {family.expert_size_field: getattr(described, family.expert_size_field)}
    before = family.router.kept_fields(whole, int(getattr(described, family.num_experts_field)))
    return values | size | before | {family.num_experts_field: experts, family.router.top_k_field: kept} | second
