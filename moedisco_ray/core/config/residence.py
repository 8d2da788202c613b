"""Check that trainings with their weights in the host's memory (`pools.*.memory`) are possible."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moedisco_ray.core.config.run import RunConfig


def check_residence(config: RunConfig) -> None:
    """Refuse a gang on several machines, and compiled layers, on a pool with `memory: streamed`.

    Raises:
        ValueError: A setting needs the weights on the card.
    """
    low, gang = config.pools.low_memory, config.finetune_pool
    size = f"pools.{gang.name}.{'max_workers' if gang is low else 'workers'}"
    if gang.memory == "streamed" and gang.most_workers > gang.gpus_per_node and config.tokens.finetune:
        raise ValueError(
            f"pools.{gang.name}.memory streamed trains the whole MoE on one machine, which has {gang.gpus_per_node} of "
            f"the pool's {gang.most_workers} workers; set {size} to {gang.gpus_per_node}, gpus_per_node to the cards "
            "of a machine, or memory to resident"
        )
    if gang.memory == "streamed" and gang.most_workers > gang.fewest_workers and config.tokens.finetune:
        raise ValueError(
            f"pools.{gang.name}.memory streamed needs a fixed number of workers, not "
            f"[{gang.fewest_workers}, {gang.most_workers}]; set {size} to one number, or memory to resident"
        )
    for name, section, pool in (("submodels", config.submodels, low), ("finetune", config.finetune, gang)):
        if pool.memory == "streamed" and section.optimizer.compile:
            raise ValueError(
                f"{name}.optimizer.compile true needs the weights on the card; leave it out, or set "
                f"pools.{pool.name}.memory to resident"
            )
