"""Check that trainings with their weights in the host's memory (`pools.*.memory`) are possible."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moedisco_ray.core.config.run import RunConfig


def check_residence(config: RunConfig) -> None:
    """Refuse a gang, and compiled layers, on a pool with `memory: streamed`.

    Raises:
        ValueError: A setting needs the weights on the card.
    """
    low, gang = config.pools.low_memory, config.finetune_pool
    if gang.memory == "streamed" and gang.most_workers > 1 and config.tokens.finetune:
        size = "max_workers" if gang is low else "workers"
        raise ValueError(
            f"pools.{gang.name}.memory streamed trains the whole MoE on one worker, and the pool has up to "
            f"{gang.most_workers}; set pools.{gang.name}.{size} to 1, or memory to resident"
        )
    for name, section, pool in (("submodels", config.submodels, low), ("finetune", config.finetune, gang)):
        if pool.memory == "streamed" and section.optimizer.compile:
            raise ValueError(
                f"{name}.optimizer.compile true needs the weights on the card; leave it out, or set "
                f"pools.{pool.name}.memory to resident"
            )
