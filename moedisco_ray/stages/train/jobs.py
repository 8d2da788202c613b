"""Training jobs, made from the configuration."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import Optimizer, RunConfig, Submodels, TrainingStageName
from moedisco_ray.core.records.summaries import UnitRecord
from moedisco_ray.core.stages import TrainingStage, training_stage
from moedisco_ray.core.store.locations import Location, joined
from moedisco_ray.core.store.manifests import CHECKPOINTS, LOGS, TRAINED
from moedisco_ray.core.store.run_store import SHARED, RunStore
from moedisco_ray.models.optimizer_state import OPTIMIZER_FOLDER
from moedisco_ray.policies.quorum import ALL, Quorum
from moedisco_ray.policies.sync_points import Scope, common_sync_steps, sync_steps
from moedisco_ray.stages.context import Context, DataOwner
from moedisco_ray.stages.text.tokenizer import Encoder
from moedisco_ray.stages.train.validation_slice import ValidationSlice
from moedisco_ray.training import HeldOut, SyncPlan, TrainJob
from moedisco_ray.training.checkpoints import checkpoint


def make_job(
    context: Context,
    stage: TrainingStageName,
    name: str,
    *,
    model: Path,
    shards: Path,
    steps: int,
    seed: int,
    owner: DataOwner | None = None,
) -> TrainJob:
    """Job of one training of a stage, from the run's configuration; `owner` is the data owner of the packed tokens."""
    config, kind = context.config, training_stage(stage)
    routes = kind.trains_whole or config.model.architecture.num_experts > config.cluster_count
    text_store = context.store if owner is None else owner.store
    context.store.fetch(model / "config.json")  # it is read when a node type is chosen
    job = TrainJob(
        stage=stage,
        name=name,
        model=model.absolute(),
        packed_dirs=(shards.absolute(),),
        output=training_home(context, stage, name) / TRAINED,
        checkpoints=checkpoint_location(context, stage, name, owner),
        steps=steps,
        sequence_length=config.corpus.sequence_length,
        optimizer=recipe_of(config, kind),
        memory=kind.pool(config).memory,
        lora=kind.lora(config),
        deterministic=config.deterministic,
        span=kind.span(config),
        checkpoint_every=config.checkpoint.steps,
        load_balance=config.finetune.load_balance if routes else 0.0,
        z_loss=config.finetune.z_loss if routes else 0.0,
        seed=seed,
        log_every=max(1, steps // 100),
        logs=text_store.directory.absolute() / LOGS,
        held_out=_held_out(context, kind),
        store=context.store,
        owner=None if owner is None else owner.name,
        owner_store=SHARED if owner is None else text_store,
    )
    checkpoint.share_key(job)
    return job


def recipe_of(config: RunConfig, stage: TrainingStage) -> Optimizer:
    """Optimizer settings of a stage.

    Frozen weights of a training of adapters get the dtype of the pool's arithmetic, on whatever machine they are
    written.
    """
    pool = stage.pool(config)
    recipe = stage.section(config).optimizer.on(pool)
    if stage.lora(config) is None or recipe.precision != "auto":
        return recipe
    return recipe.model_copy(update={"precision": recipe.arithmetic(bf16=pool.bf16)})


def training_home(context: Context, stage: str, name: str) -> Path:
    """Directory of a training's output and key, until its stage is finished."""
    return (context.checkpoints(stage) / name).absolute()


def checkpoint_location(context: Context, stage: str, name: str, owner: DataOwner | None = None) -> Location:
    """Location of a training's checkpoints: in the storage of the data owner whose text it uses, if there is one."""
    place = context.storage(stage)
    if owner is not None:
        place = joined(owner.store.location, CHECKPOINTS, context.checkpoints(stage).name)
    # Ray Train shows the name of this folder as the name of a gang's training run.
    return joined(place, f"{context.config.name}-{name}", "steps")


def _held_out(context: Context, stage: TrainingStage) -> HeldOut | None:
    """Text on which the held-out loss is measured during training; None if it is not measured, as for sub-models."""
    config = context.config
    if config.evaluation.every_tokens is None or not stage.measures_held_out:
        return None
    batch_tokens = stage.section(config).optimizer.batch_tokens * stage.members(config)
    every = max(1, config.evaluation.every_tokens // batch_tokens)
    parts = tuple(context.store.files(context.of("corpus").absolute() / "validation", ".parquet"))
    return ValidationSlice(
        every, parts, config.evaluation.slice_tokens, _encoder(context).prefix, config.corpus.sequence_length
    )


def _encoder(context: Context) -> Encoder:
    directory = context.of("corpus").absolute() / "tokenizer"
    context.store.fetch(directory)
    return Encoder(directory)


def restored_optimizer_state(context: Context, stage: str) -> Path | None:
    """Folder of the optimizer state that an earlier stage saved with its model; None if it saved none."""
    folder = (context.of(stage) / OPTIMIZER_FOLDER).absolute()
    return folder if context.store.has(folder) else None


def sync_plans(
    steps: Sequence[int], settings: Submodels, directory: Path, store: RunStore = SHARED
) -> list[SyncPlan | None]:
    """Sync plan of each sub-model, from its number of steps; None if the phase is too short for a sync point."""
    every = settings.sync_every
    points = [()] * len(steps) if every is None or len(steps) == 1 else sync_steps(steps, every)
    plan = functools.partial(_sync_plan, settings, directory, store=store, ranges=len(steps))
    return [plan(steps=at) if at else None for at in points]


def seed_sync_plans(
    steps: Sequence[int], settings: Submodels, directory: Path, store: RunStore = SHARED
) -> list[SyncPlan | None]:
    """Sync plan of each member that trains the seed, from its number of steps; None if there is one member."""
    if len(steps) == 1 or settings.sync_every is None:
        return [None] * len(steps)
    plan = functools.partial(_sync_plan, settings, directory, store=store, ranges=len(steps), scope="all")
    return [plan(steps=at) for at in common_sync_steps(steps, settings.sync_every)]


def _sync_plan(
    settings: Submodels,
    directory: Path,
    steps: tuple[int, ...],
    store: RunStore,
    ranges: int,
    scope: Scope = "backbone",
) -> SyncPlan:
    return SyncPlan(
        directory.absolute(),
        steps,
        settings.outer,
        settings.sync_patience,
        scope=scope,
        ranges=ranges,
        bits=settings.sync_bits,
        store=store,
    )


def train(context: Context, jobs: Sequence[TrainJob], placement: Placement, quorum: Quorum = ALL) -> list[Trained]:
    """Train all jobs on workers of the placement's pool."""
    directory = context.checkpoints(jobs[0].stage) / "ray"
    return context.backend.train_all(jobs, placement, directory, context.emit, stop=context.stop, quorum=quorum)


def unit_records(jobs: Sequence[TrainJob], trained: Sequence[Trained]) -> list[UnitRecord]:
    """One record per training of a stage, for the stage's summary."""
    return [_unit_record(job, done) for job, done in zip(jobs, trained, strict=True)]


def _unit_record(job: TrainJob, done: Trained) -> UnitRecord:
    return UnitRecord(
        name=job.name,
        steps=done.result.steps,
        planned_steps=job.steps,
        tokens=done.result.tokens,
        loss=done.result.loss if done.result.steps else None,
        seconds=round(done.result.seconds, 3),
        workers=round(done.workers, 3),
        held={key: round(seconds, 3) for key, seconds in done.held.items()},
        contribution=done.contribution,
        reason=done.reason,
    )
