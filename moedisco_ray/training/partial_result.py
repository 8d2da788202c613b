"""Where a training stands when nobody trains it: read from its files, and written as a model."""

from __future__ import annotations

from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.job import TrainJob, TrainResult, World
from moedisco_ray.training.optimizer import make_optimizer
from moedisco_ray.training.optimizer_state import take_up
from moedisco_ray.training.output import write_model
from moedisco_ray.training.sharding import trainable
from moedisco_ray.training.sync.member import catch_up


def read_partial_result(job: TrainJob) -> TrainResult:
    """What a training has come to by its newest checkpoint; without one, it has not begun.

    Raises:
        StorageError: The checkpoints' storage does not answer, or the newest one is damaged.
    """
    found = checkpoint.latest(job.checkpoints)
    progress = checkpoint.Progress() if found is None else checkpoint.read_progress(checkpoint.storage_of(job), found)
    return TrainResult(
        progress.step, progress.tokens, tuple(progress.losses), progress.seconds, progress.step,
        finished=progress.step == job.steps and job.output.is_dir())


def write_partial_result(job: TrainJob) -> None:
    """Write the job's model as it stands, its moments too: out of the newest checkpoint, or as it was before the first step.

    One that others have met without has the backbone of their last meeting, which it would have taken in: its own is of long ago,
    and no delta against theirs.

    Types and names are those of a finished training's model.

    Raises:
        CheckpointError: `job.model` holds no model of a known family.
        RunDirError: The disk is full.
        StorageError: The checkpoints' storage does not answer, or the newest one is damaged.
    """
    model = trainable(job.model, job.optimizer, World())
    optimizer = make_optimizer(model, job, World())
    found = checkpoint.latest(job.checkpoints)
    progress = checkpoint.Progress()
    if found is not None:
        progress = checkpoint.load(checkpoint.storage_of(job), found, model, optimizer, World())
    elif job.moments is not None:
        take_up(job.moments, model, optimizer, World())
    if job.rounds is not None:
        catch_up(job.rounds, progress, model)
    write_model(model, optimizer, job, World())
