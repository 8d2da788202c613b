"""The plan of a configuration: memory, time and cost of its run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel

from moedisco_ray.core.config import Architecture, FamilyName, RunConfig
from moedisco_ray.core.config.starts import changed
from moedisco_ray.core.limits import TEXT_BYTES_PER_TOKEN
from moedisco_ray.core.records.bill import Bill, format_dollars
from moedisco_ray.core.records.findings import is_read_often, reading_note
from moedisco_ray.core.records.ways import Alternative, verdict, with_ways
from moedisco_ray.core.stages import STAGES, training_stage
from moedisco_ray.plan.alternatives import Chosen, alternatives
from moedisco_ray.plan.cluster_count import with_cluster_count
from moedisco_ray.plan.estimate import Training, estimate_stages, idle_in_nodes, left_out, no_bill, planned_bill
from moedisco_ray.plan.files import StageStorage, Trained
from moedisco_ray.plan.inference import plan_inference
from moedisco_ray.plan.joint_ways import Trial
from moedisco_ray.plan.memory import GIB
from moedisco_ray.plan.own_cards import Idle, idle_cards, kilowatt_hours
from moedisco_ray.plan.parameters import Parameters, count_parameters
from moedisco_ray.plan.reading import StageEstimate, total
from moedisco_ray.plan.recipe import choose, keeps_submodels
from moedisco_ray.plan.speed import UNKNOWN_MACHINE, Machine, Speed, speed_of, start_up
from moedisco_ray.plan.stage_cost import cost_of
from moedisco_ray.plan.stage_plan import StagePlan, plan_stage
from moedisco_ray.plan.stage_training import StageTraining, gang_training
from moedisco_ray.plan.storage import joint_storage, plan_storage
from moedisco_ray.plan.vocabulary import planned_vocab_size
from moedisco_ray.plan.worker_plan import InferencePlan, WorkerPlan

_ASSUMPTIONS = (
    "memory includes 1 GiB and 5 % overhead; time leaves out waiting for machines, k-means, files and checkpoints; "
    "storage gives each worker at most 1 Gbit/s; the exchanges of a sharded training hide behind its computation where "
    "they are shorter"
)
_LEAST_IDLE = 0.01
"""Least cost of idle cards in whole nodes that a plan mentions, in dollars and as a share of the bill."""
_ROUNDED = {"bf16": "precision=pure_bf16", "fp8": "moments=fp8", "blocks": "block_steps="}
"""Settings that a plan may choose and that cost loss, by their names in the table of ways."""


class Plan(BaseModel, frozen=True, defer_build=True):
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
    text_tokens: int | None = None
    """Estimated tokens of the text, at 4 bytes each; null if its size is unknown, or some stays with data owners."""
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
    """The planned bill of all stages; without lines and amounts if a stage does not fit."""
    alternatives: tuple[Alternative, ...] = ()
    """Ways to train the model on the same tokens and machines: joint training on each pool, the run without sub-models,
    and last the run itself."""
    idle: tuple[Idle, ...] = ()
    """Cards that are idle for long."""
    recipe: str | None = None
    """Which way `recipe` chose, and why; null without a recipe."""
    verdict: str | None = None
    """Which of these ways costs least, in words; null if the time of the run is not known."""
    storage: tuple[StageStorage, ...]
    """Bytes that each stage stores and transfers, in pipeline order."""
    joint_training_storage: StageStorage
    """Bytes that `joint_training` stores and transfers."""
    assumptions: str


def readings(plan: Plan) -> tuple[str, bool] | None:
    """How often the run reads its text, in words, and whether that is too often; None if its size is unknown."""
    if plan.text_tokens is None:
        return None
    about = f"the text, about {plan.text_tokens:,} tokens, is read"
    return reading_note(plan.tokens, plan.text_tokens, about), is_read_often(plan.tokens, plan.text_tokens)


def too_large(plan: Plan) -> tuple[WorkerPlan, ...]:
    """The stages that certainly do not fit their pools."""
    return tuple(each for each in (*plan.stages, *plan.inference) if each.fits_known and not each.fits)


def build_plan(config: RunConfig, machine: Machine = UNKNOWN_MACHINE) -> Plan:
    """Plan parameters, memory, time and cost of a run, and of other ways to train its model.

    Without facts about the machine, time and cost of CPU workers are unknown.

    Raises:
        ConfigError: The tokenizer cannot be read, or does not fit the model; or a worker fits no node type of a mixed
            pool, so that the run would wait forever.
        CheckpointError: The directory in `model.init` holds no model that the family can start from.
    """
    given, counted = config, with_cluster_count(config)
    chosen = _choose(counted)
    config = _with(counted, chosen)
    recipe = None if chosen is None else f"recipe {given.recipe}: {chosen.name}, because {chosen.reason}"
    plan = _plan(config, machine).model_copy(
        update={"clusters_chosen": given.clusters.count == "auto", "recipe": recipe}
    )
    ways = alternatives(
        counted, _trial(config, plan, machine), lambda other: _trial(other, _plan(other, machine), machine), chosen
    )
    keeps = keeps_submodels(counted)
    words = verdict(ways, plan.bill.quality, keeps_submodels=keeps)
    bill = plan.bill if too_large(plan) else with_ways(plan.bill, ways, keeps_submodels=keeps)
    idle = () if too_large(plan) else idle_cards(config, plan.estimates, counted)
    return plan.model_copy(update={"alternatives": ways, "idle": idle, "verdict": words, "bill": bill})


def decided(config: RunConfig) -> tuple[RunConfig, Chosen | None]:
    """The configuration with a number of clusters, and with the settings of the way that `recipe` chooses.

    The choice needs no facts about a machine, so that it is the same in a plan and in the run.

    Raises:
        ConfigError: As `build_plan`; or the recipe is `joint`, and the MoE fits no pool.
        CheckpointError: As `build_plan`.
    """
    counted = with_cluster_count(config)
    chosen = _choose(counted)
    return _with(counted, chosen), chosen


def _choose(counted: RunConfig) -> Chosen | None:
    return choose(counted, lambda other: _trial(other, _plan(other, UNKNOWN_MACHINE), UNKNOWN_MACHINE))


def _with(counted: RunConfig, chosen: Chosen | None) -> RunConfig:
    """The configuration as the way that was chosen has it, which is then what its own settings say."""
    return counted if chosen is None else changed(counted, chosen.change).model_copy(update={"recipe": None})


def _trial(config: RunConfig, plan: Plan, machine: Machine) -> Trial:
    """A plan as one of several ways to train a model."""
    misfits = too_large(plan)
    limit = None
    if misfits:
        limit = max(misfits, key=lambda each: each.excess).shortage
    known = [each.seconds for each in plan.estimates if each.lines or each.seconds]
    choices = " ".join(str(stage.choice.settings) for stage in plan.stages if stage.choice is not None)
    return Trial(
        memory_gb=max((each.memory.total for each in (*plan.stages, *plan.inference)), default=0) / GIB,
        workers=max((each.workers for each in plan.stages), default=0),
        limit=limit,
        seconds=None if limit else total([start_up(None, machine), *known]),
        kilowatt_hours=None if limit else kilowatt_hours(plan.bill.lines, config),
        host_gb=max((each.memory.on_host for each in plan.stages), default=0) / GIB,
        rounded=tuple(name for name, setting in _ROUNDED.items() if setting in choices),
        bill=plan.bill,
    )


def _plan(config: RunConfig, machine: Machine) -> Plan:
    """The plan of a configuration with a number of clusters, without other ways."""
    whole = config.model.architecture
    vocab_size = planned_vocab_size(config)
    stages = tuple(plan_stage(config, training, whole, vocab_size) for training in _trainings(config, vocab_size))
    inference = plan_inference(config, vocab_size)
    trainings = _by_stage(config, stages)
    estimates = estimate_stages(config, trainings, vocab_size, machine)
    parameters = count_parameters(config.model.family_name, whole, vocab_size)
    tokens = sum(stage.cost.tokens for stage in stages)
    fitting = all(each.fits or not each.fits_known for each in (*stages, *inference))
    joint_training = plan_stage(config, gang_training(config, config.pools.high_memory, tokens), whole, vocab_size)
    return Plan(
        name=config.name,
        family=config.model.family_name,
        vocab_size=vocab_size,
        clusters=config.cluster_count,
        experts_per_submodel=whole.num_experts // config.cluster_count,
        parameters=parameters,
        stages=stages,
        inference=inference,
        fits=all(stage.fits for stage in (*stages, *inference)),
        fits_known=all(stage.fits_known for stage in (*stages, *inference)),
        tokens=tokens,
        text_tokens=None
        if config.owners or machine.text_bytes is None
        else max(1, machine.text_bytes // TEXT_BYTES_PER_TOKEN),
        training_hours=sum(stage.cost.hours for stage in stages),
        training_dollars=sum(stage.cost.dollars for stage in stages),
        joint_training=joint_training,
        finetune_elsewhere=_finetune_elsewhere(config, whole, vocab_size),
        estimates=estimates,
        speeds=tuple(speed_of(pool, machine) for each, _ in config.needed_pools for pool in each.node_types),
        bill=planned_bill(config, estimates, machine) if fitting else no_bill(),
        storage=plan_storage(
            config, {stage.stage: _trained(stage) for stage in stages}, inference, vocab_size, machine.text_bytes
        ),
        joint_training_storage=joint_storage(config, _trained(joint_training), vocab_size),
        assumptions=_ASSUMPTIONS
        + _whole_nodes(config, estimates)
        + "".join(f"; time and cost of {setting} are not known and not included" for setting in left_out(config)),
    )


def _whole_nodes(config: RunConfig, estimates: Sequence[StageEstimate]) -> str:
    """What a bill by the card leaves out where nodes are rented whole, in words; nothing if that is little."""
    idle = idle_in_nodes(config, estimates)
    if idle < max(_LEAST_IDLE, _LEAST_IDLE * sum(each.dollars or 0.0 for each in estimates)):
        return ""
    return f"; cards are billed one by one: where nodes are rented whole, their idle cards add {format_dollars(idle)}"


def fitted(config: RunConfig) -> RunConfig:
    """The configuration with the settings that a plan chooses where it does not fit; it is itself if it fits as it is.

    Raises:
        ConfigError: As `build_plan`.
        CheckpointError: As `build_plan`.
    """
    if not any(pool.gpu for pool, _ in config.needed_pools):
        return config
    for stage in _plan(with_cluster_count(config), UNKNOWN_MACHINE).stages:
        if stage.choice is not None:
            name = training_stage(stage.stage).recipe
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
    return plan_stage(moved, gang_training(moved, moved.finetune_pool, config.tokens.finetune), whole, vocab_size)


def _by_stage(config: RunConfig, stages: tuple[StagePlan, ...]) -> dict[str, Training]:
    return {
        stage.stage: Training(
            cost=stage.cost,
            units=stage.units,
            at_once=stage.at_once,
            workers_per_unit=stage.workers // stage.at_once,
            types=stage.types,
            experts=config.model.architecture.num_experts
            // (1 if training_stage(stage.stage).trains_whole else config.cluster_count),
            sync_seconds=0.0 if stage.sync is None else stage.sync.wait_seconds,
        )
        for stage in stages
    }


def _trained(stage: StagePlan) -> Trained:
    workers = stage.workers // stage.at_once
    shares = workers / stage.replicas * stage.memory.mean_share
    weights = (stage.memory.streamed or stage.memory.weights) + stage.memory.unpacked
    return Trained(
        pool=stage.pool,
        units=stage.units,
        workers=workers,
        steps=stage.steps,
        hours=stage.cost.hours / stage.cost.waves,
        weights=round(weights * shares),
        optimizer=round((stage.memory.optimizer + stage.memory.offloaded) * shares),
        frozen=weights - _adapters(stage) if stage.adapters else 0,
        offloaded=stage.memory.offloaded,
        host=stage.memory.host,
        for_syncs=stage.memory.synced,
        device=stage.memory.total if stage.fits_known else 0,
        handed_over=0 if stage.block_wise or stage.adapters else round(2 * weights * shares),
        tokens=stage.cost.tokens,
        synced=0 if stage.sync is None else stage.sync.bytes,
        exchanged=0 if stage.traffic is None else stage.traffic.bytes * stage.steps * workers,
    )


def _adapters(stage: StagePlan) -> int:
    """Bytes of the adapters that a stage trains: those of their gradients, or half of AdamW's moments."""
    return stage.memory.offloaded // 2 if stage.memory.streamed else stage.memory.gradients


def _trainings(config: RunConfig, vocab_size: int) -> Iterator[StageTraining]:
    for stage in STAGES:
        plan = cost_of(stage).training
        if plan is not None and (training := plan(config, vocab_size)).tokens:
            yield training
