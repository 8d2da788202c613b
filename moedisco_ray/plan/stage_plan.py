"""The plan of one training stage: its memory, time, cost and traffic, and the settings with which it fits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from pydantic import ValidationError

from moedisco_ray.core.config import AnyPool, Architecture, Lora, LowMemoryPool, Optimizer, RunConfig, TrainingStageName
from moedisco_ray.core.config.derived import with_conversations_apart
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.stages import training_stage
from moedisco_ray.plan.cost import (
    Cost,
    TypeShare,
    flops_per_token,
    mixed_cost,
    optimizer_flops_per_token,
    training_cost,
)
from moedisco_ray.plan.fitting import Choice, Exchanging, Room, choose, copy_seconds, least_memory
from moedisco_ray.plan.gang_traffic import GangTraffic, gang_traffic, planned_layout, step_exchanges, with_exchange
from moedisco_ray.plan.memory import GIB, Exchange, Memory, exchange_of, worker_memory
from moedisco_ray.plan.parameters import Parameters, adapter_parameters, count_parameters, submodel_architecture
from moedisco_ray.plan.remedy import Remedy, find_remedy
from moedisco_ray.plan.seed_workers import exchange_flops, member_memory, seed_traffic, seed_workers
from moedisco_ray.plan.stage_training import ALL_WEIGHTS, StageTraining
from moedisco_ray.plan.steps import unit_steps
from moedisco_ray.plan.streamed_way import streamed_flops, training_memory
from moedisco_ray.plan.sync_traffic import Sync, plan_sync
from moedisco_ray.plan.worker_plan import WorkerPlan
from moedisco_ray.policies.parallel import Layout

_WITH_ADAMW = ("submodels.optimizer.name=adamw", "finetune.optimizer.name=adamw")
USUAL_RANK = 16
"""Rank of the adapters that a plan proposes to a run without any."""


class StagePlan(WorkerPlan, frozen=True):
    """The plan of one training stage."""

    stage: TrainingStageName
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
    are with them. Null if it fits as it is, or if no settings without a value of the user's make it fit; `memory` is
    then that of the settings that lack least."""
    block_wise: bool = False
    """Whether one block of weights trains at a time, so that no optimizer state is handed over to the next stage."""
    adapters: int = 0
    """Number of parameters of the adapters (`lora`) that train instead of the weights; 0 if the weights
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


def plan_stage(config: RunConfig, training: StageTraining, whole: Architecture, vocab_size: int) -> StagePlan:
    """Plan one training stage of a model with the sizes `whole`.

    Raises:
        ConfigError: A worker fits no node type of a mixed pool, so that the run would wait forever.
    """
    family, length = config.model.family_name, config.corpus.sequence_length
    pool, units, optimizer = training.pool, training.units, training.optimizer.on(training.pool)
    together = training.workers if units == 1 and not training.sharded else 1
    # The seed and the sub-models have the same settings, so both must fit, and what needs one worker is open to
    # neither.
    seed_gang = (1, 1) if training.sharded else seed_workers(config, vocab_size)

    def measure(trial: Optimizer, spread: int, lora: Lora = training.lora) -> Memory:
        if training.sharded:
            return _gang_memory(config, pool, trial, whole, vocab_size, workers=spread, lora=lora)[0]
        shape = submodel_architecture(family, whole, spread)
        return member_memory(config, shape, vocab_size, trial, gang=seed_gang, lora=lora)

    shape = whole if training.sharded else submodel_architecture(family, whole, config.cluster_count)
    memory = measure(optimizer, training.spread.now)
    pool_gb = max(kind.memory_gb for kind in pool.node_types)
    in_one = training.sharded and pool.memory == "streamed"  # one worker drives all cards of a machine
    host_gb = pool.host_gb(training.workers if in_one else 1)
    fits = memory.fits(pool_gb, host_gb)
    parameters = count_parameters(family, shape, vocab_size)
    flops = flops_per_token(parameters, shape, length, checkpointing=False)
    section, workers = ("finetune", training.workers) if training.sharded else ("submodels", together)
    step_seconds = flops * optimizer.batch_tokens / (workers * pool.flops(shape.num_experts))
    choice, is_gang = None, training.sharded and workers > 1 and not in_one
    if pool.gpu and not fits:
        alone = (not training.sharded or pool.most_workers == 1) and seed_gang[1] == 1 and not training.lora.rank
        room = Room(length, pool_gb, host_gb, 1 if in_one else workers, alone)
        at_spread = functools.partial(measure, spread=training.spread.now)
        gang = _exchanging(config, pool, whole, vocab_size) if is_gang else None
        choice = choose(
            at_spread, optimizer, room, section=f"{section}.optimizer", step_seconds=step_seconds, exchange=gang
        )
        memory = (
            least_memory(at_spread, optimizer, room)
            if choice is None
            else measure(choice.optimizer, training.spread.now)
        )
    if choice is not None:
        optimizer, fits = choice.optimizer, True
    remedy_for = functools.partial(
        find_remedy,
        optimizer=optimizer,
        section=f"{section}.optimizer",
        sequence_length=length,
        pool_gb=pool_gb,
        host_gb=host_gb,
        sharded=training.sharded,
        step_seconds=step_seconds,
        alone=seed_gang[1] == 1,
    )
    remedy = None if fits else _remedy(config, training, remedy_for, measure)
    if remedy is not None and pool.mixed:
        raise ConfigError(
            f"pools.{pool.name}.types",
            pool_gb,
            f"a worker of {training.stage} needs {memory.total / GIB:.1f} GiB, more than any node type has; {remedy}",
        )
    flops, traffic, replicas = _computing(config, training, optimizer, memory, shape, vocab_size=vocab_size)
    scope = training_stage(training.stage).syncs
    steps = unit_steps(training.tokens, optimizer, [1] * units)
    tokens = sum(steps) * optimizer.batch_tokens
    types: tuple[TypeShare, ...] = ()
    if isinstance(pool, LowMemoryPool) and pool.mixed:
        cost, types = mixed_cost(
            flops, tokens, pool, memory.total / GIB, experts=shape.num_experts, units=units, owned=training.owned
        )
    else:
        cost = training_cost(
            flops,
            tokens,
            pool,
            experts=shape.num_experts,
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
        host_memory_gb=pool.host_memory_gb,
        host_gb=host_gb,
        fits=fits,
        fits_known=pool.gpu > 0,
        choice=choice,
        block_wise=bool(optimizer.block_steps),
        adapters=adapter_parameters(family, shape, training.lora.rank),
        remedy=remedy,
        cost=cost,
        types=types,
        sync=None
        if scope is None
        else plan_sync(config.submodels, pool, steps[-1], units, parameters, slots=training.workers, scope=scope),
        replicas=replicas,
        traffic=traffic,
    )


def _computing(
    config: RunConfig,
    training: StageTraining,
    optimizer: Optimizer,
    memory: Memory,
    shape: Architecture,
    *,
    vocab_size: int,
) -> tuple[float, GangTraffic | None, int]:
    """Operations per token of a training, what its workers exchange, and how many of them have the same weights.

    Time for copies and exchanges that computing does not hide counts as the operations that the cards could have made.
    """
    family, length, pool = config.model.family_name, config.corpus.sequence_length, training.pool
    parameters = count_parameters(family, shape, vocab_size)
    together = training.workers if training.units == 1 and not training.sharded else 1
    replicas, traffic = together, None
    if memory.streamed:
        cards = training.workers if training.sharded else 1
        flops = streamed_flops(family, shape, vocab_size, optimizer, pool, sequence_length=length, cards=cards)
    else:
        flops = flops_per_token(parameters, shape, length, checkpointing=bool(optimizer.gradient_checkpointing))
    if training.sharded and not memory.streamed:
        traffic = _traffic(config, pool, optimizer, shape, vocab_size)
        replicas = _layout(config, pool, optimizer, shape, vocab_size, workers=training.workers).replicate
    flops = with_exchange(flops, traffic, pool, shape.num_experts, optimizer.batch_tokens)
    if not memory.streamed:  # else they are in the time of a step
        flops += copy_seconds(memory) * pool.flops(shape.num_experts) / optimizer.batch_tokens
        flops += optimizer_flops_per_token(family, shape, optimizer, pool, replicas=replicas)
    if together > 1:
        traffic = seed_traffic(config, shape, vocab_size, together)
        flops += exchange_flops(config, traffic, together, shape.num_experts)
    return flops, traffic, replicas


def _remedy(
    config: RunConfig, training: StageTraining, remedy_for: Callable[..., Remedy], measure: Callable[..., Memory]
) -> Remedy:
    """Settings with which a training fits, or takes least memory, even with another optimizer or with 4-bit weights."""
    alone = dataclasses.replace(training.spread, more=()) if training.sharded else training.spread
    remedy = remedy_for(
        measure, adapters=training.lora.rank > 0, spread=alone if training.lora.rank else training.spread
    )
    section = training_stage(training.stage).recipe
    if not remedy.fits and (lora := _in_four_bits(config, training.stage)) is not None:
        found = remedy_for(functools.partial(measure, lora=lora), adapters=True, spread=alone)
        added = [
            f"{section}.lora.base={lora.base}",
            *([] if training.lora.rank else [f"{section}.lora.rank={lora.rank}"]),
        ]
        if found.memory_gb < remedy.memory_gb:
            remedy = found.model_copy(update={"settings": (*found.settings, *added)})
    if not remedy.fits and training.optimizer.name == "muon":  # what saves most memory needs AdamW
        adamw = training.optimizer.model_copy(update={"name": "adamw"})
        found = remedy_for(measure, optimizer=adamw, adapters=False, spread=training.spread)
        if found.memory_gb < remedy.memory_gb:
            remedy = found.model_copy(update={"settings": (*_WITH_ADAMW, *found.settings)})
    return remedy


def _in_four_bits(config: RunConfig, stage: TrainingStageName) -> Lora | None:
    """Adapters of weights in 4 bits, if a stage does not train them already and its run's other settings allow them."""
    kind = training_stage(stage)
    section = kind.section(config)
    lora = section.lora.model_copy(update={"base": "nf4", "rank": section.lora.rank or USUAL_RANK})
    if not kind.may_adapt or section.lora.base == "nf4":
        return None
    values = config.model_dump()
    try:
        RunConfig.model_validate(values | {kind.recipe: values[kind.recipe] | {"lora": lora.model_dump()}})
    except ValidationError:
        return None
    return lora


def _layout(
    config: RunConfig, pool: AnyPool, optimizer: Optimizer, whole: Architecture, vocab_size: int, *, workers: int
) -> Layout:
    """The layout of a gang that trains the whole model."""

    def fits(shards: int) -> bool:
        needed = worker_memory(
            config.model.family_name,
            whole,
            vocab_size,
            optimizer,
            sequence_length=config.corpus.sequence_length,
            gpu=pool.gpu,
            workers=shards,
        )
        return needed.total <= min(kind.memory_gb for kind in pool.node_types) * GIB

    return planned_layout(config, pool, optimizer, workers, fits)


def _gang_memory(
    config: RunConfig,
    pool: AnyPool,
    optimizer: Optimizer,
    whole: Architecture,
    vocab_size: int,
    *,
    workers: int,
    lora: Lora = ALL_WEIGHTS,
) -> tuple[Memory, Exchange]:
    """Memory of one worker of a gang, and how often the workers exchange weights and gradients."""
    measure = functools.partial(
        training_memory,
        config.model.family_name,
        whole,
        vocab_size,
        optimizer=with_conversations_apart(config, optimizer),
        residence=pool.memory,
        sequence_length=config.corpus.sequence_length,
        gpu=pool.gpu,
        lora=lora,
    )
    if pool.memory == "streamed":
        return measure(cards=workers), "step"
    layout = _layout(config, pool, optimizer, whole, vocab_size, workers=workers)
    by_exchange = functools.partial(measure, workers=workers, layout=layout)
    exchange = exchange_of(lambda each: by_exchange(exchange=each), min(kind.memory_gb for kind in pool.node_types))
    return by_exchange(exchange=exchange), exchange


def _exchanging(config: RunConfig, pool: AnyPool, whole: Architecture, vocab_size: int) -> Exchanging:
    """Time of a gang's exchanges, by the settings of its optimizer."""
    family, workers = config.model.family_name, pool.fewest_workers
    parameters = count_parameters(family, whole, vocab_size)

    def seconds(optimizer: Optimizer, exchange: Exchange) -> float:
        exchanges = step_exchanges(
            family,
            whole,
            parameters,
            optimizer,
            sequence_length=config.corpus.sequence_length,
            gpu=pool.gpu,
            layout=_layout(config, pool, optimizer, whole, vocab_size, workers=workers),
            exchange=exchange,
        )
        return sum(each.seconds(pool) for each in exchanges)

    def in_step(optimizer: Optimizer) -> float:
        return seconds(optimizer, _gang_memory(config, pool, optimizer, whole, vocab_size, workers=workers)[1])

    def with_room(optimizer: Optimizer) -> float:
        return seconds(optimizer, "step")

    return Exchanging(in_step, with_room)


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
        pool=pool,
        layout=_layout(config, pool, optimizer, whole, vocab_size, workers=workers),
        exchange=_gang_memory(config, pool, optimizer, whole, vocab_size, workers=workers)[1],
    )
