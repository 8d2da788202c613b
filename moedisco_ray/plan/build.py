"""The plan of a configuration: memory, time and cost of each training stage."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ValidationError

from moedisco_ray.core.bill import Bill
from moedisco_ray.core.config import (
    AnyPool,
    Architecture,
    FamilyName,
    Lora,
    LowMemoryPool,
    Optimizer,
    RunConfig,
    TrainingStage,
)
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan.cluster_count import low_memory_slots, with_cluster_count
from moedisco_ray.plan.cost import PEAK_FLOPS, UTILISATION, Cost, TypeShare, flops_per_token, mixed_cost, training_cost
from moedisco_ray.plan.estimate import StageEstimate, Training, estimate_stages, left_out, planned_bill
from moedisco_ray.plan.fitting import Choice, choose, copy_seconds
from moedisco_ray.plan.gang_traffic import (
    LINK_BYTES_PER_SECOND,
    GangTraffic,
    gang_traffic,
    planned_layout,
    with_exchange,
)
from moedisco_ray.plan.memory import GIB, Exchange, Memory, exchange_of, worker_memory
from moedisco_ray.plan.parameters import Parameters, adapter_parameters, count_parameters, submodel_architecture
from moedisco_ray.plan.remedy import Remedy, Spread, find_remedy
from moedisco_ray.plan.seed_workers import (
    NETWORK_BYTES_PER_SECOND,
    exchange_flops,
    member_memory,
    seed_traffic,
    seed_workers,
)
from moedisco_ray.plan.speed import UNKNOWN_MACHINE, Machine, Speed, speed_of
from moedisco_ray.plan.stage_memory import InferencePlan, WorkerPlan, plan_inference
from moedisco_ray.plan.steps import unit_steps
from moedisco_ray.plan.storage import StageStorage, Trained, joint_storage, plan_storage
from moedisco_ray.plan.sync_traffic import Sync, plan_sync
from moedisco_ray.plan.vocabulary import planned_vocab_size

_ASSUMPTIONS = (
    "memory includes 1 GB and 5 % overhead; time leaves out waiting for machines, k-means, files and checkpoints; GPUs "
    f"of a gang exchange {LINK_BYTES_PER_SECOND / 1e9:.0f} GB/s, and workers that train the seed together "
    f"{NETWORK_BYTES_PER_SECOND / 1e9} GB/s"
)

FULL = Lora()
"""A training of all weights."""
_WITH_ADAMW = ("submodels.optimizer.name=adamw", "finetune.optimizer.name=adamw")
USUAL_RANK = 16
"""Rank of the adapters that a plan proposes to a run without any."""


class StagePlan(WorkerPlan, frozen=True):
    """The plan of one training stage."""

    stage: TrainingStage
    units: int
    """Number of trainings: one per sub-model, and one per member of the seed."""
    workers: int
    """Number of workers that train at the same time. For the elastic gang of a fine-tune this is the minimum number,
    with which the model must fit; for that of a seed, the maximum."""
    parameters: Parameters
    """Parameter counts of the model that each training trains."""
    steps: int
    """Optimizer steps of each training, or of the longest one; sub-models count as equally long."""
    choice: Choice | None
    """Settings that the run uses because the model does not fit with those in the configuration; `memory` and `cost`
    are with them. Null if it fits as it is, or if no settings without a value of the user's make it fit."""
    block_wise: bool = False
    """Whether one block of weights trains at a time, so that no optimizer state is handed over to the next stage."""
    adapters: int = 0
    """Number of parameters of the adapters (`submodels.lora`) that train instead of the weights; 0 if the weights
    train."""
    cost: Cost
    sync: Sync | None
    """Data that sub-models transfer to synchronise their backbones, or the seed's members all weights; null without
    syncs."""
    replicas: int = 1
    """Number of replicas of the model among the workers of a gang."""
    traffic: GangTraffic | None = None
    """Data that the workers of a gang exchange in one step; null for a single worker."""
    types: tuple[TypeShare, ...] = ()
    """Part of the stage that each node type of a mixed pool trains; empty for any other pool."""

    @property
    def at_once(self) -> int:
        """Number of models that train at the same time."""
        return min(self.units, self.workers)


class Plan(BaseModel, frozen=True):
    """The plan of a run, as `moedisco plan` shows it."""

    name: str
    family: FamilyName
    vocab_size: int
    clusters: int
    clusters_chosen: bool = False
    """Whether `clusters.count: auto` decided the number of clusters."""
    experts_per_submodel: int
    parameters: Parameters
    """Parameter counts of the whole MoE."""
    stages: tuple[StagePlan, ...]
    inference: tuple[InferencePlan, ...] = ()
    """The stages that run text through a model without training it."""
    fits: bool
    """Whether all stages fit the memory of their pools."""
    fits_known: bool
    """Whether `fits` is reliable for all stages."""
    tokens: int
    """Tokens that the run trains on: the whole batches of its phases."""
    training_hours: float
    """Wall-clock hours of training alone, computed from operation counts, so that comparisons and remedies are the same
    on every machine. The time and cost of the run are in the bill."""
    training_dollars: float
    """Cost of training alone in dollars, computed from operation counts like `training_hours`."""
    joint_training: StagePlan
    """Training the whole model on as many tokens on the high-memory pool, with the settings of the fine-tune."""
    finetune_elsewhere: StagePlan | None = None
    """The fine-tune on all workers of the pool that does not run it, for comparison; null without a fine-tune, or if
    that pool has several node types."""
    estimates: tuple[StageEstimate, ...]
    """Estimates of all stages, in pipeline order."""
    speeds: tuple[Speed, ...]
    """Speed of each pool's workers, and where the figure comes from."""
    bill: Bill
    """The planned bill of all stages."""
    storage: tuple[StageStorage, ...]
    """Bytes that each stage stores and transfers, in pipeline order."""
    joint_training_storage: StageStorage
    """Bytes that `joint_training` stores and transfers."""
    assumptions: str


@dataclasses.dataclass(frozen=True)
class _Training:
    stage: TrainingStage
    pool: AnyPool
    optimizer: Optimizer
    units: int
    workers: int
    tokens: int
    sharded: bool
    spread: Spread
    lora: Lora = FULL
    owned: tuple[float, ...] = ()


def build_plan(config: RunConfig, machine: Machine = UNKNOWN_MACHINE) -> Plan:
    """Plan parameters, memory, time and cost of a run.

    Without facts about the machine, time and cost of CPU workers are unknown.

    Raises:
        ConfigError: The tokenizer cannot be read, or does not fit the model; or a worker fits no node type of a mixed
            pool, so that the run would wait forever.
        CheckpointError: The directory in `model.init` holds no model that the family can start from.
    """
    given, config = config, with_cluster_count(config)
    whole = config.model.architecture
    vocab_size = planned_vocab_size(config)
    stages = tuple(
        _plan_stage(config, training, whole, vocab_size) for training in _trainings(config, whole, vocab_size)
    )
    inference = plan_inference(config, vocab_size)
    trainings = _by_stage(config, stages)
    estimates = estimate_stages(config, trainings, vocab_size, machine)
    parameters = count_parameters(config.model.family_name, whole, vocab_size)
    tokens = sum(stage.cost.tokens for stage in stages)
    joint_training = _plan_stage(config, _gang(config, config.pools.high_memory, tokens), whole, vocab_size)
    return Plan(
        name=config.name,
        family=config.model.family_name,
        vocab_size=vocab_size,
        clusters=config.cluster_count,
        clusters_chosen=given.clusters.count == "auto",
        experts_per_submodel=whole.num_experts // config.cluster_count,
        parameters=parameters,
        stages=stages,
        inference=inference,
        fits=all(stage.fits for stage in (*stages, *inference)),
        fits_known=all(stage.fits_known for stage in (*stages, *inference)),
        tokens=tokens,
        training_hours=sum(stage.cost.hours for stage in stages),
        training_dollars=sum(stage.cost.dollars for stage in stages),
        joint_training=joint_training,
        finetune_elsewhere=_finetune_elsewhere(config, whole, vocab_size),
        estimates=estimates,
        speeds=tuple(speed_of(pool, machine) for each, _ in config.needed_pools for pool in each.node_types),
        bill=planned_bill(config, estimates, trainings, vocab_size, machine),
        storage=plan_storage(
            config, {stage.stage: _trained(stage) for stage in stages}, inference, vocab_size, machine.text_bytes
        ),
        joint_training_storage=joint_storage(config, _trained(joint_training), vocab_size),
        assumptions=_ASSUMPTIONS
        + "".join(f"; time and cost of {setting} are not known and not included" for setting in left_out(config)),
    )


def fitted(config: RunConfig) -> RunConfig:
    """The configuration with the settings that a plan chooses where it does not fit; it is itself if it fits as it is.

    Raises:
        ConfigError: As `build_plan`.
        CheckpointError: As `build_plan`.
    """
    if not any(pool.gpu for pool, _ in config.needed_pools):
        return config
    for stage in build_plan(config).stages:
        if stage.choice is not None:
            name = "finetune" if stage.stage == "finetune" else "submodels"
            section = getattr(config, name).model_copy(update={"optimizer": stage.choice.optimizer})
            config = config.model_copy(update={name: section})
    return config


def _finetune_elsewhere(config: RunConfig, whole: Architecture, vocab_size: int) -> StagePlan | None:
    other: Literal["low_memory", "high_memory"] = (
        "high_memory" if config.finetune.pool == "low_memory" else "low_memory"
    )
    moved = config.model_copy(update={"finetune": config.finetune.model_copy(update={"pool": other})})
    if not config.tokens.finetune or moved.finetune_pool.mixed:
        return None
    return _plan_stage(moved, _gang(moved, moved.finetune_pool, config.tokens.finetune), whole, vocab_size)


def _by_stage(config: RunConfig, stages: tuple[StagePlan, ...]) -> dict[str, Training]:
    return {
        stage.stage: Training(
            cost=stage.cost,
            units=stage.units,
            at_once=stage.at_once,
            workers_per_unit=stage.workers // stage.at_once,
            types=stage.types,
            experts=config.model.architecture.num_experts // (1 if stage.stage == "finetune" else config.cluster_count),
            sync_seconds=0.0 if stage.sync is None else stage.sync.wait_seconds,
        )
        for stage in stages
    }


def _trained(stage: StagePlan) -> Trained:
    workers = stage.workers // stage.at_once
    shares, weights = workers / stage.replicas * stage.memory.mean_share, stage.memory.weights + stage.memory.unpacked
    return Trained(
        pool=stage.pool,
        units=stage.units,
        workers=workers,
        steps=stage.steps,
        hours=stage.cost.hours / stage.cost.waves,
        weights=round(weights * shares),
        optimizer=round((stage.memory.optimizer + stage.memory.offloaded) * shares),
        # The adapters take the same memory as their gradients.
        frozen=weights - stage.memory.gradients if stage.adapters else 0,
        offloaded=stage.memory.offloaded,
        device=stage.memory.total if stage.fits_known else 0,
        handed_over=0 if stage.block_wise or stage.adapters else round(2 * weights * shares),
        tokens=stage.cost.tokens,
        synced=0 if stage.sync is None else stage.sync.bytes,
        exchanged=0 if stage.traffic is None else stage.traffic.bytes * stage.steps * workers,
    )


def _trainings(config: RunConfig, whole: Architecture, vocab_size: int) -> list[_Training]:
    low, clusters = config.pools.low_memory, config.cluster_count
    recipe = config.submodels.optimizer
    more_clusters = tuple(n for n in range(clusters + 1, whole.num_experts + 1) if whole.num_experts % n == 0)
    split = Spread("clusters.count", clusters, more_clusters)
    slots = low_memory_slots(config)
    at_once = min(clusters, slots)
    members = config.seed_members
    together = seed_workers(config, vocab_size)[1]
    trainings = [
        _Training(
            "seed",
            pool=low,
            optimizer=recipe,
            units=members,
            workers=together if together > 1 else min(members, slots - len(config.owners)),
            tokens=config.tokens.seed,
            sharded=False,
            spread=split,
        ),
        _Training(
            "submodels",
            pool=low,
            optimizer=recipe,
            units=clusters,
            workers=at_once,
            tokens=config.tokens.submodels,
            sharded=False,
            spread=split,
            lora=config.submodels.lora,
            owned=tuple(config.pools.owner(name).price_per_hour for name in config.owners),
        ),
        _gang(config, config.finetune_pool, config.tokens.finetune),
    ]
    return [training for training in trainings if training.tokens]


def _gang(config: RunConfig, pool: AnyPool, tokens: int) -> _Training:
    """Training of the whole model on a pool."""
    optimizer, workers = config.finetune.optimizer, pool.fewest_workers
    sequences = optimizer.batch_tokens // config.corpus.sequence_length
    more_workers = tuple(n for n in range(workers + 1, sequences + 1) if sequences % n == 0)
    size = "max_workers" if isinstance(pool, LowMemoryPool) else "workers"
    return _Training(
        "finetune",
        pool=pool,
        optimizer=optimizer,
        units=1,
        workers=workers,
        tokens=tokens,
        sharded=True,
        spread=Spread(f"pools.{pool.name}.{size}", workers, more_workers),
    )


def _plan_stage(config: RunConfig, training: _Training, whole: Architecture, vocab_size: int) -> StagePlan:
    family, length = config.model.family_name, config.corpus.sequence_length
    optimizer, pool, units = training.optimizer, training.pool, training.units
    together = training.workers if units == 1 and not training.sharded else 1
    # The seed and the sub-models have the same settings, so both must fit, and what needs one worker is open to
    # neither.
    seed_gang = (1, 1) if training.sharded else seed_workers(config, vocab_size)

    def measure(trial: Optimizer, spread: int, lora: Lora = training.lora) -> Memory:
        if training.sharded:
            return _gang_memory(config, pool, trial, whole, vocab_size, workers=spread)[0]
        shape = submodel_architecture(family, whole, spread)
        return member_memory(config, shape, vocab_size, trial, gang=seed_gang, lora=lora)

    shape = whole if training.sharded else submodel_architecture(family, whole, config.cluster_count)
    memory = measure(optimizer, training.spread.now)
    pool_gb = max(kind.memory_gb for kind in pool.node_types)
    fits = memory.total <= pool_gb * GIB
    parameters = count_parameters(family, shape, vocab_size)
    flops = flops_per_token(parameters, shape, length, checkpointing=False)
    section, workers = (
        ("finetune.optimizer", training.workers) if training.sharded else ("submodels.optimizer", together)
    )
    step_seconds = flops * optimizer.batch_tokens / (workers * PEAK_FLOPS * UTILISATION * pool.speed)
    choice = (
        None
        if fits or not pool.gpu
        else choose(
            lambda trial: measure(trial, training.spread.now),
            optimizer,
            section=section,
            sequence_length=length,
            pool_gb=pool_gb,
            workers=workers,
            alone=(not training.sharded or pool.most_workers == 1) and seed_gang[1] == 1 and not training.lora.rank,
            step_seconds=step_seconds,
        )
    )
    if choice is not None:
        optimizer, memory, fits = choice.optimizer, measure(choice.optimizer, training.spread.now), True
    remedy_for = functools.partial(
        find_remedy,
        optimizer=optimizer,
        spread=training.spread,
        section=section,
        sequence_length=length,
        pool_gb=pool_gb,
        sharded=training.sharded,
        step_seconds=step_seconds,
        alone=seed_gang[1] == 1,
    )
    remedy = None if fits else _remedy(config, training, remedy_for, measure)
    if remedy is not None and pool.mixed:
        raise ConfigError(
            f"pools.{pool.name}.types",
            pool_gb,
            f"a worker of {training.stage} needs {memory.total / GIB:.1f} GB, more than any node type has; {remedy}",
        )
    # The step waits while optimizer state is copied from the host. Express that time as FLOPs, as if the GPU computed
    # meanwhile.
    waiting = copy_seconds(memory) / step_seconds * flops
    flops = flops_per_token(parameters, shape, length, checkpointing=bool(optimizer.gradient_checkpointing))
    traffic = _traffic(config, pool, optimizer, whole, vocab_size) if training.sharded else None
    flops = with_exchange(flops, traffic, pool, optimizer.batch_tokens) + waiting
    if together > 1:
        traffic = seed_traffic(config, shape, vocab_size, together)
        flops += exchange_flops(config, traffic, together)
    steps = unit_steps(training.tokens, optimizer, [1] * units)
    tokens = sum(steps) * optimizer.batch_tokens
    types: tuple[TypeShare, ...] = ()
    if isinstance(pool, LowMemoryPool) and pool.mixed:
        cost, types = mixed_cost(flops, tokens, pool, memory.total / GIB, units=units, owned=training.owned)
    else:
        cost = training_cost(
            flops,
            tokens,
            pool,
            units=units,
            owned=training.owned,
            at_once=1 if training.sharded else training.workers,
            workers_per_unit=training.workers if training.sharded else together,
        )
    return StagePlan(
        stage=training.stage,
        pool=pool.name,
        units=units,
        workers=training.workers,
        parameters=parameters,
        steps=steps[0],
        memory=memory,
        pool_gb=pool_gb,
        fits=fits,
        fits_known=pool.gpu > 0,
        choice=choice,
        block_wise=bool(optimizer.block_steps),
        adapters=adapter_parameters(family, shape, training.lora.rank),
        remedy=remedy,
        cost=cost,
        types=types,
        sync=None
        if training.sharded
        else plan_sync(
            config.submodels, steps[-1], units, parameters, scope="all" if training.stage == "seed" else "backbone"
        ),
        replicas=planned_layout(config, optimizer, workers).replicate if training.sharded else together,
        traffic=traffic,
    )


def _remedy(
    config: RunConfig, training: _Training, remedy_for: Callable[..., Remedy], measure: Callable[..., Memory]
) -> Remedy:
    """Settings with which a training fits, or takes least memory, even with another optimizer or with 4-bit weights."""
    remedy = remedy_for(measure, adapters=training.lora.rank > 0)
    if not remedy.fits and training.stage == "submodels" and (lora := _in_four_bits(config)) is not None:
        found = remedy_for(functools.partial(measure, lora=lora), adapters=True)
        added = [
            f"submodels.lora.base={lora.base}",
            *([] if training.lora.rank else [f"submodels.lora.rank={lora.rank}"]),
        ]
        if found.memory_gb < remedy.memory_gb:
            remedy = found.model_copy(update={"settings": (*found.settings, *added)})
    if not remedy.fits and training.optimizer.name == "muon":  # what saves most memory needs AdamW
        found = remedy_for(measure, optimizer=training.optimizer.model_copy(update={"name": "adamw"}), adapters=False)
        if found.memory_gb < remedy.memory_gb:
            remedy = found.model_copy(update={"settings": (*_WITH_ADAMW, *found.settings)})
    return remedy


def _in_four_bits(config: RunConfig) -> Lora | None:
    """Adapters of weights in 4 bits, if the run does not train them already and its other settings allow them."""
    now = config.submodels.lora
    lora = now.model_copy(update={"base": "nf4", "rank": now.rank or USUAL_RANK})
    values = config.model_dump()
    try:
        RunConfig.model_validate(values | {"submodels": values["submodels"] | {"lora": lora.model_dump()}})
    except ValidationError:
        return None
    return None if now.base == "nf4" else lora


def _gang_memory(
    config: RunConfig, pool: AnyPool, optimizer: Optimizer, whole: Architecture, vocab_size: int, *, workers: int
) -> tuple[Memory, Exchange]:
    """Memory of one worker of a gang, and how often the workers exchange weights and gradients."""
    by_exchange = functools.partial(
        worker_memory,
        config.model.family_name,
        whole,
        vocab_size,
        optimizer,
        sequence_length=config.corpus.sequence_length,
        gpu=pool.gpu,
        workers=workers,
        layout=planned_layout(config, optimizer, workers),
    )
    exchange = exchange_of(
        config.finetune.exchange,
        lambda each: by_exchange(exchange=each),
        min(kind.memory_gb for kind in pool.node_types),
    )
    return by_exchange(exchange=exchange), exchange


def _traffic(
    config: RunConfig, pool: AnyPool, optimizer: Optimizer, whole: Architecture, vocab_size: int
) -> GangTraffic | None:
    """Data that the workers of a gang exchange in one step; None for a single worker."""
    workers = pool.fewest_workers
    if workers == 1:
        return None
    return gang_traffic(
        config.model.family_name,
        whole,
        vocab_size,
        optimizer,
        sequence_length=config.corpus.sequence_length,
        gpu=pool.gpu,
        layout=planned_layout(config, optimizer, workers),
        exchange=_gang_memory(config, pool, optimizer, whole, vocab_size, workers=workers)[1],
    )
