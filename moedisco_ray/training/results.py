"""The results of a training: the trained model, or the partial result of a training that was given up."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.core.errors import DamagedError, MoeDiscoError, StorageError
from moedisco_ray.core.store.artifacts import reporting_full_disk, write_json
from moedisco_ray.core.store.checksums import with_checksum, without_checksum
from moedisco_ray.core.store.manifests import ADAPTER_FOLDER
from moedisco_ray.core.store.run_work import unpickled
from moedisco_ray.models import config_values, open_complete, stored_tensors
from moedisco_ray.models.optimizer_state import OPTIMIZER_FOLDER
from moedisco_ray.training.blocks import Blocks
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.consensus import from_rank_zero, on_all
from moedisco_ray.training.job import TrainJob, TrainResult, World
from moedisco_ray.training.lora import merge_adapters, merged_tensors, save_adapters, saved_part
from moedisco_ray.training.optimizer import make_optimizer
from moedisco_ray.training.optimizer_state import load_optimizer_state, save_optimizer_state
from moedisco_ray.training.sharded_files import reader, write_tensors
from moedisco_ray.training.sharding import trainable
from moedisco_ray.training.sync.member import load_latest


def write_model(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    job: TrainJob,
    world: World,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write the trained model to `job.output`, a Hugging Face directory with canonical names.

    Every worker must call it.

    The optimizer's state is written too if `job.with_optimizer_state` is set. Every worker writes its own files.
    Adapters are written too, and then merged into the model's weights.

    Args:
        model: The trained model.
        optimizer: Its optimizer.
        job: The training.
        world: Rank and device of this worker, and the number of workers.
        group: Process group for coordination, see `sharded_files.cpu_group`; None: the default group.

    Raises:
        RunDirError: The disk is full.
        StorageError: The run's URI does not respond.
    """
    draft = _shared_draft(job, world, group)
    try:
        with reporting_full_disk(job.output):
            adapters = save_adapters(model, job.lora, draft / ADAPTER_FOLDER) if job.lora is not None else []
            tensors, values = _merged(model, job)
            written = adapters + write_tensors(draft, tensors, config_values(model.config), world, group, values=values)
            if job.with_optimizer_state:
                written += save_optimizer_state(model, optimizer, draft / OPTIMIZER_FOLDER, world, group)
            on_all(lambda: job.store.publish(*written), world, group)
            from_rank_zero(lambda: job.store.replace(draft, job.output, {"stage": job.stage}), world, group)
    except (OSError, MoeDiscoError):
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _merged(model: PreTrainedModel, job: TrainJob) -> tuple[Mapping[str, Tensor], Callable[[str], Tensor] | None]:
    """The tensors of a model with merged adapters, and a function that makes those not in memory; None: all are."""
    if job.lora is not None and job.lora.base == "nf4":
        return merged_tensors(model, reader(open_complete(job.model)[0]))
    merge_adapters(model)
    return stored_tensors(model), None


def _shared_draft(job: TrainJob, world: World, group: dist.ProcessGroup | None) -> Path:
    """The directory on this machine to which its workers write their parts of the model; rank 0 empties it first."""

    def begin() -> bytes:
        draft = job.store.draft(job.output)
        shutil.rmtree(draft, ignore_errors=True)
        return job.store.dumps(draft)

    found: Path = unpickled(from_rank_zero(begin, world, group))
    return found


def drop_checkpoints(job: TrainJob, result: TrainResult) -> None:
    """Record the result of a finished training, whose output is complete, and delete its checkpoints.

    The record is written first. If the process dies before that, the training resumes from its last checkpoint and
    finishes again. If the process dies later, the remaining checkpoints are deleted with those of the stage.
    """
    write_json(job.result_file, with_checksum(dataclasses.asdict(result)))
    job.store.publish(job.result_file)
    with contextlib.suppress(StorageError):  # not fatal: checkpoints that remain are deleted at the end of the stage
        checkpoint.remove(job.checkpoints)


def finished_result(job: TrainJob) -> TrainResult | None:
    """The recorded result of a finished training; None if there is no record.

    Raises:
        DamagedError: The record, or a file of the output of a run in a directory, is damaged. What a run at a URI has
            damaged is found when the next stage fetches it.
    """
    if not job.drop_checkpoints or not job.store.has(job.output):
        return None
    job.store.fetch(job.result_file)
    if not job.result_file.is_file():
        return None
    if not job.store.is_remote:
        job.store.fetch(job.output)
    try:
        values = without_checksum(job.result_file.read_bytes())
    except ValueError as error:
        raise DamagedError(
            job.store.name_of(job.result_file) or job.result_file.name, job.stage, str(job.store.location)
        ) from error
    return TrainResult(**{**values, "losses": tuple(values["losses"])})


def read_partial_result(job: TrainJob) -> TrainResult:
    """The result of a training: the recorded one, or that of its newest checkpoint; 0 steps if there is no checkpoint.

    Checkpoints of a data owner are not looked for: the driver may not reach them.

    Raises:
        StorageError: The checkpoint storage does not respond, or the newest checkpoint is damaged.
    """
    finished = finished_result(job)
    if finished is not None:
        return finished
    step = checkpoint.latest(job.checkpoints) if job.owner is None else None
    progress = checkpoint.Progress() if step is None else checkpoint.read_progress(checkpoint.storage_of(job), step)
    return TrainResult(
        progress.step,
        progress.tokens,
        tuple(progress.losses),
        progress.seconds,
        restored_step=progress.step,
        finished=progress.step == job.steps and job.store.has(job.output),
    )


def write_partial_result(job: TrainJob) -> None:
    """Write the model of an unfinished training from its newest checkpoint, or from the start model if there is none.

    If the other members have passed a sync point without this one, the model gets the common weights of the latest sync
    point, because its own were trained from older ones. Dtypes and names are those of a finished training's model.

    Raises:
        CheckpointError: `job.model` holds no model of a supported family.
        RunDirError: The disk is full.
        StorageError: The checkpoint storage does not respond, or the newest checkpoint is damaged.
    """
    job.store.fetch(*job.reads)
    model = trainable(job.model, job.optimizer, World(), lora=job.lora, seed=job.seed)
    step = checkpoint.latest(job.checkpoints)
    if job.optimizer.block_steps and step:
        Blocks(model, job).select(step - 1)
    optimizer = make_optimizer(model, job, World())
    progress = checkpoint.Progress()
    if step is not None:
        progress = checkpoint.load(checkpoint.storage_of(job), step, saved_part(model), optimizer, World())
    elif job.optimizer_state is not None:
        load_optimizer_state(job.optimizer_state, model, optimizer, World())
    load_latest(job, progress, model)
    write_model(model, optimizer, job, World())
