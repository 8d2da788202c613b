"""Cost of the fine-tune: a training of the whole MoE by a gang."""

from __future__ import annotations

from moedisco_ray.core.config import RunConfig
from moedisco_ray.plan.stage_cost import cost_of_training
from moedisco_ray.plan.stage_training import StageTraining, gang_training


def _training(config: RunConfig, _vocab_size: int) -> StageTraining:
    return gang_training(config, config.finetune_pool, config.tokens.finetune)


COST = cost_of_training("finetune", _training)
