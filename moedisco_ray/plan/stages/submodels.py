"""Cost of the sub-models: a training for each cluster, on a low-memory worker or on a data owner's."""

from __future__ import annotations

from moedisco_ray.core.config import RunConfig
from moedisco_ray.plan.cluster_count import low_memory_slots
from moedisco_ray.plan.files import Files
from moedisco_ray.plan.reading import Reading, StageEstimate
from moedisco_ray.plan.stage_cost import StageCost
from moedisco_ray.plan.stage_plan import StageTraining, more_clusters


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
        owned=tuple(config.pools.owner(name).price_per_hour for name in config.owners),
    )


def _untrained(reading: Reading) -> StageEstimate:
    return reading.on_head("submodels", 0.0)


def _takes_over_its_input(_files: Files) -> None:
    return None


COST = StageCost(_untrained, _takes_over_its_input, training=_training)
