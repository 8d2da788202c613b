"""Check that adapters (`submodels.lora`, `finetune.lora`) have a trained model to adapt, and one worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from moedisco_ray.core.config.inits import LocalInit, UpcycleInit

if TYPE_CHECKING:
    from moedisco_ray.core.config.run import RunConfig


def check_adapters(config: RunConfig) -> None:
    """Refuse adapters of weights that nothing has trained, or with settings that need all weights to train.

    Raises:
        ValueError: The first setting that excludes adapters.
    """
    for name, section in (("submodels", config.submodels), ("finetune", config.finetune)):
        if not section.lora.rank:
            continue
        reasons = _of_submodels(config) if name == "submodels" else _of_finetune(config)
        recipe = section.optimizer
        common = (
            (recipe.name == "muon", f"needs the optimizer adamw; set {name}.optimizer.name"),
            (bool(recipe.block_steps), f"trains no blocks of weights; leave out {name}.optimizer.block_steps"),
        )
        for applies, reason in (*reasons, *common):
            if applies:
                raise ValueError(f"{name}.lora.rank {section.lora.rank} {reason}")


def _of_submodels(config: RunConfig) -> Iterator[tuple[bool, str]]:
    init = config.model.init
    yield not isinstance(init, LocalInit), "adapts a trained model; name one in model.init"
    drawn = isinstance(init, UpcycleInit) and init.reinitialise > 0
    yield drawn, "freezes the weights that model.init.reinitialise draws anew; set model.init.reinitialise to 0"
    seeds = config.tokens.seed_share > 0
    yield seeds, "leaves a seed no memory, because a seed trains all weights; set tokens.seed_share to 0"
    syncs = config.submodels.sync_every is not None
    yield syncs, "allows no syncs: adapters are merged at the end; set submodels.sync_every to null"


def _of_finetune(config: RunConfig) -> Iterator[tuple[bool, str]]:
    pool = config.finetune_pool
    untrained = not (config.tokens.decoupled or config.model.starts_from_moe)
    yield untrained, "adapts a trained MoE; name one in model.init.checkpoint, or train sub-models"
    size = f"{pool.path}.{'max_workers' if pool.name == 'low_memory' else 'workers'}"
    several = pool.most_workers > 1 and pool.memory != "streamed"
    yield several, f"trains on one worker; set {size} {pool.most_workers} to 1, or {pool.path}.memory to streamed"
