"""The plan of a configuration: memory, time and cost of its run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel

from moedisco_ray.core.config import Architecture, FamilyName, RunConfig
from moedisco_ray.core.records.bill import Bill
from moedisco_ray.core.stages import STAGES, training_stage
from moedisco_ray.plan.alternatives import Alternative, Trial, alternatives, verdict
from moedisco_ray.plan.cluster_count import with_cluster_count
from moedisco_ray.plan.estimate import Training, estimate_stages, left_out, no_bill, planned_bill
from moedisco_ray.plan.files import StageStorage, Trained
from moedisco_ray.plan.inference import plan_inference
from moedisco_ray.plan.memory import GIB
from moedisco_ray.plan.parameters import Parameters, count_parameters
from moedisco_ray.plan.reading import StageEstimate, total
from moedisco_ray.plan.speed import UNKNOWN_MACHINE, Machine, Speed, speed_of, start_up
from moedisco_ray.plan.stage_cost import cost_of
from moedisco_ray.plan.stage_plan import StagePlan, StageTraining, gang_training, plan_stage
from moedisco_ray.plan.storage import joint_storage, plan_storage
from moedisco_ray.plan.vocabulary import planned_vocab_size
from moedisco_ray.plan.worker_plan import InferencePlan, WorkerPlan

_ASSUMPTIONS = (
    "memory includes 1 GB and 5 % overhead; time leaves out waiting for machines, k-means, files and checkpoints; "
    "storage gives each worker at most 1 Gbit/s; the exchanges of a sharded training hide behind its computation where "
    "they are shorter"
)


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
    """The planned bill of all stages; without lines and amounts if a stage does not fit."""
    alternatives: tuple[Alternative, ...] = ()
    """Ways to train the model on the same tokens and machines: joint training on each pool, the run without sub-models,
    and last the run itself."""
    verdict: str | None = None
    """Which of these ways costs least, in words; null if the time of the run is not known."""
    storage: tuple[StageStorage, ...]
    """Bytes that each stage stores and transfers, in pipeline order."""
    joint_training_storage: StageStorage
    """Bytes that `joint_training` stores and transfers."""
    assumptions: str


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
    given, config = config, with_cluster_count(config)
    plan = _plan(config, machine).model_copy(update={"clusters_chosen": given.clusters.count == "auto"})
    ways, baseline = alternatives(config, _trial(plan, machine), lambda other: _trial(_plan(other, machine), machine))
    words = verdict(ways, plan.bill.quality)
    bill = (
        plan.bill
        if too_large(plan)
        else planned_bill(config, plan.estimates, machine, baseline=baseline, verdict=words)
    )
    return plan.model_copy(update={"alternatives": ways, "verdict": words, "bill": bill})


def _trial(plan: Plan, machine: Machine) -> Trial:
    """A plan as one of several ways to train a model."""
    misfits = too_large(plan)
    limit = None
    if misfits:
        worst = max(misfits, key=lambda each: each.memory.total / each.pool_gb)
        limit = f"{worst.stage} needs {worst.memory.total / GIB:.1f} of {worst.pool_gb:g} GiB per card"
    known = [each.seconds for each in plan.estimates if each.lines or each.seconds]
    return Trial(
        memory_gb=max((each.memory.total for each in (*plan.stages, *plan.inference)), default=0) / GIB,
        workers=max((each.workers for each in plan.stages), default=0),
        limit=limit,
        seconds=None if limit else total([start_up(None, machine), *known]),
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


def _trainings(config: RunConfig, vocab_size: int) -> Iterator[StageTraining]:
    for stage in STAGES:
        plan = cost_of(stage).training
        if plan is not None and (training := plan(config, vocab_size)).tokens:
            yield training
