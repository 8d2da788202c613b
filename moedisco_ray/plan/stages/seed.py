"""Cost of the seed: a training of one model by one worker, a gang, or members that synchronise."""

from __future__ import annotations

from moedisco_ray.core.config import RunConfig
from moedisco_ray.plan.cluster_count import low_memory_slots
from moedisco_ray.plan.files import Files, StageStorage
from moedisco_ray.plan.seed_workers import seed_workers
from moedisco_ray.plan.stage_cost import cost_of_training
from moedisco_ray.plan.stage_training import StageTraining, more_clusters


def _training(config: RunConfig, vocab_size: int) -> StageTraining:
    members, together = config.seed_members, seed_workers(config, vocab_size)[1]
    alone = min(members, low_memory_slots(config) - len(config.owners))
    return StageTraining(
        "seed",
        pool=config.pools.low_memory,
        optimizer=config.submodels.optimizer,
        units=members,
        workers=together if together > 1 else alone,
        tokens=config.tokens.seed,
        sharded=False,
        spread=more_clusters(config),
    )


def _untrained(files: Files) -> StageStorage | None:
    parts = files.trained.get("submodels")
    return None if parts is None else files.starts("seed", read=0, stored=parts.weights)


COST = cost_of_training("seed", _training, _untrained)
