"""Cost of the sub-models: a training for each cluster, on a low-memory worker or on a data owner's."""

from __future__ import annotations

from moedisco_ray.core.config import RunConfig
from moedisco_ray.plan.cluster_count import low_memory_slots
from moedisco_ray.plan.stage_cost import cost_of_training
from moedisco_ray.plan.stage_training import StageTraining, more_clusters


def _training(config: RunConfig, _vocab_size: int) -> StageTraining:
    return StageTraining(
        "submodels",
        pool=config.pools.low_memory,
        optimizer=config.submodels.optimizer,
        units=config.cluster_count,
        workers=min(config.cluster_count, low_memory_slots(config)),
        tokens=config.tokens.submodels,
        sharded=False,
        spread=more_clusters(config),
        lora=config.submodels.lora,
        owned=tuple(pool.price_per_hour for pool in config.pools.of_owners),
    )


COST = cost_of_training("submodels", _training)
