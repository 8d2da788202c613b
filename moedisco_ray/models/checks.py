"""Whether tensors, configuration and clusters fit together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.models.layout import ModelMap


def group_size(num_experts: int, clusters: int) -> int:
    """Experts per sub-model.

    Raises:
        ConfigError: The clusters do not divide the experts.
    """
    if num_experts % clusters:
        raise ConfigError("clusters.count", clusters, f"does not divide the model's {num_experts} experts")
    return num_experts // clusters


def expert_count(config: Mapping[str, Any]) -> int:
    """Routed experts per MoE layer, from a `config.json`.

    Raises:
        CheckpointError: It does not say.
    """
    field = ModelMap(str(config.get("model_type"))).family.num_experts_field
    # transformers reads and writes either name for some families.
    found = config.get(field, config.get("num_experts", config.get("num_local_experts")))
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(field, found, "the model's config.json must hold the number of experts here")
    return found


def check_experts(keys: Iterable[str], model_map: ModelMap, num_experts: int) -> None:
    """Assert that every MoE layer has exactly this many experts, each with all its parts, and a router.

    Raises:
        CheckpointError: One does not.
    """
    for layer, count in model_map.experts(keys).items():
        if count != num_experts:
            raise CheckpointError("tensor", model_map.router_key(layer),
                                  f"its layer has {count} experts where the configuration says {num_experts}")


def check_complete(keys: Iterable[str], expected: Iterable[str]) -> None:
    """Assert that a model has exactly the tensors it should have, by name.

    Raises:
        CheckpointError: One is missing, or one too many is there.
    """
    found, needed = set(keys), set(expected)
    if missing := sorted(needed - found):
        raise CheckpointError("tensor", missing[0], f"is missing, with {len(missing) - 1} more: an incomplete model")
    if unknown := sorted(found - needed):
        raise CheckpointError("tensor", unknown[0], "is not in a model of this configuration")
