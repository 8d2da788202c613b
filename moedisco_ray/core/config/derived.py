"""Values that follow from several settings, and on which the results of a stage depend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moedisco_ray.core.config.apart import apart_choice
from moedisco_ray.core.config.optimizer import Optimizer, precision_on
from moedisco_ray.core.config.pool import Pool
from moedisco_ray.core.config.run import RunConfig
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.limits import USE_TOKENS


def _precision(optimizer: Optimizer, pool: Pool) -> Mapping[str, Any]:
    return {"precision": optimizer.arithmetic(bf16=pool.bf16), "state": optimizer.state}


def with_conversations_apart(config: RunConfig, optimizer: Optimizer) -> Optimizer:
    """The settings with `within_documents` if the run trains on conversations, which layers can keep apart."""
    sizes, family = config.model.architecture, DECLARATIONS[config.model.family_name]
    recurrent = family.recurrent_layers(sizes.fields, sizes.num_hidden_layers)
    apart = not recurrent and any(source.has_conversations for source in config.corpus.sources)
    return optimizer.model_copy(update={"within_documents": True}) if apart else optimizer


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
    syncs = settings.model_dump(include={"sync_every", "outer", "sync_bits"}, exclude_none=True) if members > 1 else {}
    return {"family": config.model.family_name, **of_submodels(config), "seed_members": members, **syncs}


def of_finetune(config: RunConfig) -> Mapping[str, Any]:
    """Precision of the fine-tune."""
    return _precision(config.finetune.optimizer, config.finetune_pool)


def of_evaluation(config: RunConfig) -> Mapping[str, Any]:
    """Precision of the evaluation, and what decides whether the sub-models stay apart."""
    return {"precision": precision_on(bf16=config.finetune_pool.bf16), "keep_apart": apart_choice(config)}


def measures_cut(config: RunConfig) -> bool:
    """Whether it is measured what the sub-models lose that a trained MoE is cut into."""
    return config.model.starts_from_moe and config.tokens.decoupled


def experts_by_use(config: RunConfig) -> bool:
    """Whether a sub-model gets the experts that its cluster's text selects most, instead of a group by index.

    Only if the start's routers say something about text and the merge keeps them, if no text stays with data owners,
    and if the router does not limit tokens to groups of experts, which sub-models would cut.
    """
    if not (_has_kept_experts(config) and config.cluster_count > 1) or config.owners:
        return False
    groups = DECLARATIONS[config.model.family_name].router.groups(config.model.architecture.fields)
    return groups is None or groups[0] == 1


def use_tokens(config: RunConfig) -> int:
    """Number of tokens on which the use of experts is measured."""
    return min(USE_TOKENS, config.merge.calibration_tokens)


def of_decompose(config: RunConfig) -> Mapping[str, Any]:
    """How sub-models get the experts of a trained MoE, where it differs from the default."""
    if not measures_cut(config):
        return {}
    if not _has_kept_experts(config):
        return {"experts": "by index"}
    return {} if use_tokens(config) == USE_TOKENS else {"use_tokens": use_tokens(config)}


def _has_kept_experts(config: RunConfig) -> bool:
    return measures_cut(config) and config.merge.method(from_moe=True) == "kept"
