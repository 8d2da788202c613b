"""Checks: whether tensors, configuration and clusters fit together, and whether two models are equal bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PretrainedConfig

from moedisco_ray.core.config import EXPERT_COUNTS, LocalInit, Model, UpcycleInit
from moedisco_ray.core.config.start_files import start_directory
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.store.locations import is_uri
from moedisco_ray.models.checkpoint import Checkpoint, open_checkpoint, read_config
from moedisco_ray.models.dense import open_dense, upcycled_config
from moedisco_ray.models.hf import canonical_shapes, from_values, submodel_config
from moedisco_ray.models.layout import ModelMap

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Dtype that compares numbers of a size in bytes by their bits."""


def group_size(num_experts: int, clusters: int) -> int:
    """Number of experts per sub-model.

    Raises:
        ConfigError: The number of experts is not a multiple of the number of clusters.
    """
    if num_experts % clusters:
        raise ConfigError(
            "clusters.count", clusters, f"does not divide the model's {num_experts} experts; use a divisor"
        )
    return num_experts // clusters


def expert_count(config: Mapping[str, Any]) -> int:
    """Number of routed experts per MoE layer, from the values of a `config.json`.

    Raises:
        CheckpointError: The number is missing or not positive.
    """
    field = ModelMap(str(config.get("model_type"))).family.num_experts_field
    # For some families, transformers accepts two names of this field in a `config.json`, and writes either of them.
    found = next((config[name] for name in (field, *EXPERT_COUNTS) if name in config), None)
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(field, found, "the model's config.json must hold the number of experts here")
    return found


def check_experts(keys: Iterable[str], model_map: ModelMap, num_experts: int) -> None:
    """Check that every MoE layer has a router and `num_experts` complete experts.

    Raises:
        CheckpointError: A layer lacks its router or a part of an expert.
    """
    for layer, count in model_map.experts(keys).items():
        if count and count != num_experts:  # experts stored in one tensor are counted when it is read
            raise CheckpointError(
                "tensor",
                model_map.router_key(layer),
                f"its layer has {count} experts, but the configuration says {num_experts}",
            )


def check_complete(keys: Iterable[str], expected: Iterable[str]) -> None:
    """Check that a model has exactly the expected tensors, by name.

    Raises:
        CheckpointError: A tensor is missing or unexpected.
    """
    found, needed = set(keys), set(expected)
    if missing := sorted(needed - found):
        raise CheckpointError(
            "tensor", missing[0], f"is missing, with {len(missing) - 1} more; the model is incomplete"
        )
    if unknown := sorted(found - needed):
        raise CheckpointError("tensor", unknown[0], "is not in a model of this configuration")


def open_complete(directory: Path) -> tuple[Checkpoint, PretrainedConfig]:
    """Open a model directory with exactly the tensors of its `config.json`, by name; also returns the configuration.

    Raises:
        CheckpointError: The directory cannot be read, or its tensors are not those of its `config.json`.
    """
    stored = open_checkpoint(directory)
    try:
        config = from_values(stored.config)
        check_complete(stored, canonical_shapes(config))
    except (OSError, ValueError) as error:
        raise CheckpointError("checkpoint", str(directory), f"cannot be loaded ({error})") from error
    except CheckpointError as error:
        raise CheckpointError("checkpoint", str(directory), f"tensor {error.value} {error.remedy}") from error
    return stored, config


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have equal dtype, shape and bits (a NaN equals itself, 0.0 does not equal -0.0)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    bits = _BITS[left.itemsize]
    return torch.equal(left.view(bits), right.view(bits))


def differences(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that differ between two models, or that only one of them has."""
    return sorted(
        [key for key in left if key not in right or not same_bits(left[key], right[key])]
        + [key for key in right if key not in left]
    )


def check_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """Check that two models are equal bit for bit.

    Raises:
        CheckpointError: The models differ.
    """
    if found := differences(left, right):
        raise CheckpointError("tensor", found[0], f"differs between the two models, with {len(found) - 1} more")


def check_start_tensors(model: Model) -> None:
    """Check that the tensors of the start model have the names and shapes that the run's model needs.

    Without a start model there is nothing to check; a run's model at a URI is checked where its weights are read. The
    check reads file headers and `config.json`, and builds the model on the meta device, which takes seconds and little
    memory for a model of any size. The only tensors that it reads are biases that the family does not have, since a
    bias may be dropped if it is zero.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape; a file cannot be read; or transformers
            cannot build a model from the configuration. The error names the setting in `model.init`.
    """
    start = model.init
    if not isinstance(start, LocalInit) or is_uri(start.place):
        return
    try:
        found, expected = _shapes(start, model)
    except CheckpointError as error:
        if error.field == start.setting:
            raise
        raise CheckpointError(
            start.setting, str(start_directory(start)), f"{error.field} {error.value}: {error.remedy}"
        ) from error
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        reason = f"transformers builds no model from its config.json ({type(error).__name__}: {first})"
        raise CheckpointError(start.setting, str(start_directory(start)), reason) from error
    _check_shapes(found, expected, start)


def _shapes(start: LocalInit, model: Model) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes by canonical name: those of the stored tensors, and those that the configuration requires."""
    directory = start_directory(start)
    if isinstance(start, UpcycleInit):
        stored: Any = open_dense(directory, model.family_name, start.num_experts)
        whole = upcycled_config(directory, model.family_name, start.num_experts, start.num_experts_per_tok)
        config: Mapping[str, Any] = submodel_config(whole, 1)
    else:
        stored, config = open_checkpoint(directory), read_config(directory)
    return {key: stored.shape(key) for key in stored}, canonical_shapes(config)


def _check_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], start: LocalInit
) -> None:
    problems = {
        "is missing": sorted(expected.keys() - found.keys()),
        "is not in the model that its config.json describes": sorted(found.keys() - expected.keys()),
        "has another shape than its config.json says": sorted(
            key for key in expected.keys() & found.keys() if expected[key] != found[key]
        ),
    }
    for problem, keys in problems.items():
        if keys:
            has_both = keys[0] in found and keys[0] in expected
            shapes = f" ({list(found[keys[0]])} instead of {list(expected[keys[0]])})" if has_both else ""
            more = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(
                start.setting,
                str(start_directory(start)),
                f"tensor {keys[0]} {problem}{shapes}{more}; name a directory whose weights fit its config.json",
            )
