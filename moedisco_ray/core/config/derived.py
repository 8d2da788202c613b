"""Values that follow from several settings, and on which the results of a stage depend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moedisco_ray.core.config.apart import apart_choice
from moedisco_ray.core.config.optimizer import Optimizer, precision_on
from moedisco_ray.core.config.pool import Pool
from moedisco_ray.core.config.run import RunConfig


def _precision(optimizer: Optimizer, pool: Pool) -> Mapping[str, Any]:
    return {"precision": optimizer.arithmetic(bf16=pool.bf16), "state": optimizer.state}


def places_of_owners(config: RunConfig) -> Mapping[str, Any]:
    """Storage of each data owner, whose text is there."""
    return {f"pools.owners.{name}.storage": owner.storage for name, owner in config.pools.owners.items()}


def of_submodels(config: RunConfig) -> Mapping[str, Any]:
    """Values of the sub-models, and of the seed: precision, and router losses if they have several experts."""
    routed = config.model.architecture.num_experts > config.cluster_count
    losses = {"load_balance": config.finetune.load_balance, "z_loss": config.finetune.z_loss}
    return {**_precision(config.submodels.optimizer, config.pools.low_memory), **(losses if routed else {})}


def of_seed(config: RunConfig) -> Mapping[str, Any]:
    """Values of the seed: family, those of the sub-models, and how several members synchronise."""
    members, settings = config.seed_members, config.submodels
    syncs = {"sync_every": settings.sync_every, "outer": settings.outer.model_dump()} if members > 1 else {}
    return {"family": config.model.family_name, **of_submodels(config), "seed_members": members, **syncs}


def of_finetune(config: RunConfig) -> Mapping[str, Any]:
    """Precision of the fine-tune."""
    return _precision(config.finetune.optimizer, config.finetune_pool)


def of_evaluation(config: RunConfig) -> Mapping[str, Any]:
    """Precision of the evaluation, and what decides whether the sub-models stay apart."""
    return {"precision": precision_on(bf16=config.finetune_pool.bf16), "keep_apart": apart_choice(config)}
