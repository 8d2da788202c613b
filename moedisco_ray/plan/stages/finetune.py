"""Cost of the fine-tune: a training of the whole MoE by a gang."""

from __future__ import annotations

from moedisco_ray.core.config import RunConfig
from moedisco_ray.plan.files import Files
from moedisco_ray.plan.reading import Reading, StageEstimate
from moedisco_ray.plan.stage_cost import StageCost
from moedisco_ray.plan.stage_plan import StageTraining, gang_training


def _training(config: RunConfig, _vocab_size: int) -> StageTraining:
    return gang_training(config, config.finetune_pool, config.tokens.finetune)


def _untrained(reading: Reading) -> StageEstimate:
    return reading.on_head("finetune", 0.0)


def _takes_over_its_input(_files: Files) -> None:
    return None


COST = StageCost(_untrained, _takes_over_its_input, training=_training)
