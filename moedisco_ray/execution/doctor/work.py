"""What an examination tries on a slot of each pool, from a configuration and its plan."""

from __future__ import annotations

import dataclasses

from moedisco_ray.core.config import Architecture, FamilyName, Optimizer, Pool, RunConfig
from moedisco_ray.core.config.derived import with_conversations_apart
from moedisco_ray.core.stages import OF_CLUSTERS, training_stage
from moedisco_ray.core.store.locations import Location
from moedisco_ray.execution.doctor.system import Wanted
from moedisco_ray.plan.build import build_plan
from moedisco_ray.plan.cluster_count import with_cluster_count
from moedisco_ray.plan.memory import GIB
from moedisco_ray.plan.parameters import submodel_architecture
from moedisco_ray.plan.stage_plan import StagePlan
from moedisco_ray.plan.vocabulary import planned_vocab_size
from moedisco_ray.training.examination.trial import Trial


@dataclasses.dataclass(frozen=True)
class SlotWork:
    """What to try on a slot of a pool.

    Attributes:
        pool: The pool, or a node type of a mixed pool.
        wanted: What the configuration expects of the slot.
        family: Family of the model.
        architecture: Sizes of the whole model.
        vocab_size: Rows of its embedding.
        optimizer: Settings of the pool's largest training.
        trial: That training; None: it is not tried.
        why_not: Why it is not tried.
        one_worker: Whether one worker trains it, so that its memory can be measured on one slot.
        workers: Number of workers that train at the same time.
    """

    pool: Pool
    wanted: Wanted
    family: FamilyName
    architecture: Architecture
    vocab_size: int
    optimizer: Optimizer
    trial: Trial | None
    why_not: str = ""
    one_worker: bool = True
    workers: int = 1


@dataclasses.dataclass(frozen=True)
class Work:
    """An examination.

    Attributes:
        slots: What to try, by pool or node type.
        storage: Where the run stores its files and checkpoints.
        configured: Whether a user's configuration is examined, not a built-in one.
    """

    slots: tuple[SlotWork, ...]
    storage: Location
    configured: bool = True


def work_of(config: RunConfig, *, configured: bool = True) -> Work:
    """What to try for a configuration.

    Raises:
        ConfigError: As `build_plan`.
        CheckpointError: As `build_plan`.
    """
    config = with_cluster_count(config)
    stages = build_plan(config).stages
    vocab_size = planned_vocab_size(config)
    return Work(
        slots=tuple(
            _slot_work(config, node_type, stages, vocab_size, configured=configured)
            for pool, _ in config.needed_pools
            for node_type in pool.node_types
        ),
        storage=config.checkpoint.storage or config.location,
        configured=configured,
    )


def _slot_work(
    config: RunConfig, pool: Pool, stages: tuple[StagePlan, ...], vocab_size: int, *, configured: bool
) -> SlotWork:
    own = [stage for stage in stages if stage.pool == pool.name]
    largest = max(own, key=lambda stage: (stage.stage in OF_CLUSTERS, stage.memory.total), default=None)
    recipes = [_recipe(config, stage, pool) for stage in own]
    recipe = config.submodels.optimizer.on(pool) if largest is None else _recipe(config, largest, pool)
    wanted = Wanted(
        path=pool.path if configured else "",
        memory_gb=pool.memory_gb if configured and pool.gpu else None,
        needed_gb=max((stage.memory.total / GIB for stage in own), default=None),
        card=pool.card if configured else None,
        fp32=all(each.arithmetic(bf16=pool.bf16) == "fp32" for each in recipes),
        compiles=any(each.compile for each in recipes),
    )
    trial, why_not = (
        (None, "no training runs there") if largest is None else _trial(config, pool, largest, recipe, vocab_size)
    )
    return SlotWork(
        pool=pool,
        wanted=wanted,
        family=config.model.family_name,
        architecture=config.model.architecture,
        vocab_size=vocab_size,
        optimizer=recipe,
        trial=trial,
        why_not=why_not,
        one_worker=largest is None or largest.workers == largest.at_once,
        workers=max((stage.workers for stage in own), default=1),
    )


def _recipe(config: RunConfig, stage: StagePlan, pool: Pool) -> Optimizer:
    configured: Optimizer = training_stage(stage.stage).section(config).optimizer
    return (configured if stage.choice is None else stage.choice.optimizer).on(pool)


def _trial(
    config: RunConfig, pool: Pool, stage: StagePlan, recipe: Optimizer, vocab_size: int
) -> tuple[Trial | None, str]:
    if stage.adapters:
        return None, "trainings of adapters are not tried"
    if pool.memory == "streamed":
        return None, "streamed trainings are not tried"
    if stage.fits_known and not stage.fits:
        return None, "the plan says that it does not fit"
    whole = training_stage(stage.stage).trains_whole
    family, sizes = config.model.family_name, config.model.architecture
    trial = Trial(
        stage=stage.stage,
        family=family,
        architecture=sizes if whole else submodel_architecture(family, sizes, config.cluster_count),
        vocab_size=vocab_size,
        sequence_length=config.corpus.sequence_length,
        optimizer=with_conversations_apart(config, recipe),
        planned=stage.memory,
        routes=whole or sizes.num_experts > config.cluster_count,
    )
    return trial, ""
