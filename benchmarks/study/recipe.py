"""Extracts the recipe from a configuration: the settings that decide quality, without machines and the run's size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moedisco_ray.core.config import RunConfig

_SECTIONS = ("tokens", "clusters", "submodels", "merge", "finetune")
_SIZE = ("tokens.total",)
_MACHINES = (
    "submodels.quorum",
    "submodels.optimizer.micro_batch",
    "submodels.optimizer.precision",
    "submodels.optimizer.gradient_checkpointing",
    "submodels.optimizer.moments",
    "submodels.optimizer.offload_moments",
    "finetune.optimizer.micro_batch",
    "finetune.optimizer.precision",
    "finetune.optimizer.gradient_checkpointing",
    "finetune.optimizer.moments",
    "finetune.optimizer.offload_moments",
)
"""Settings that decide how work is done, not what is computed; none of them should change a loss."""
_RESCALING = ("merge.router", "merge.calibration_tokens")


def recipe(config: RunConfig) -> dict[str, Any]:
    """The settings that a run was trained with.

    Returns:
        {dotted path: JSON value}, without settings that have no effect in this configuration, such as `clusters.count`
        in joint training.
    """
    raw = config.model_dump(mode="json", include=set(_SECTIONS))
    return {
        path: value for path, value in _leaves(raw) if path not in (*_SIZE, *_MACHINES) and _has_a_say(path, config)
    }


def _leaves(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in raw.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _has_a_say(path: str, config: RunConfig) -> bool:
    tokens = config.tokens
    if path == "submodels.keep_optimizer_state":
        return tokens.decoupled and tokens.seed > 0
    if path == "finetune.keep_optimizer_state":
        return tokens.finetune > 0 and (tokens.decoupled or tokens.seed > 0)
    if path.startswith("finetune."):
        return tokens.finetune > 0
    if path.startswith("submodels.optimizer.") or path == "clusters.count":
        return tokens.decoupled or tokens.seed > 0  # the seed has the size of a sub-model, and trains like one
    if path == "submodels.seed_members" or path.startswith("submodels.outer."):
        return config.submodels.sync_every is not None and (tokens.decoupled or config.seed_members > 1)
    # The experts of an upcycled seed are rescaled like merged experts.
    rescaled = path in _RESCALING and tokens.seed > 0 and not config.model.architecture.norm_topk_prob
    synchronised = path == "submodels.sync_every" and config.seed_members > 1
    return tokens.decoupled or path.startswith("tokens.") or rescaled or synchronised
