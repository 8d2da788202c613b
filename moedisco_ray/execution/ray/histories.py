"""What the next attempt at a training must know about the earlier ones, stored next to the training's output."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from moedisco_ray.core.errors import StorageError
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.policies import retrying
from moedisco_ray.policies.checkpointing import ASSUMED
from moedisco_ray.policies.retrying import Decision, End, GiveUp, GoBack, History, Skip
from moedisco_ray.training import TrainJob
from moedisco_ray.training.checkpoints import checkpoint


def adjusted(job: TrainJob, history: History, losses_per_hour: float = ASSUMED.per_hour) -> TrainJob:
    """A copy of the job with its history's memory settings and skipped batches, and the rate of lost workers."""
    changes: dict[str, int | bool] = {"micro_batch": history.micro_batch}
    if history.recompute:
        changes["gradient_checkpointing"] = True
    optimizer = job.optimizer.model_copy(update=changes)
    return dataclasses.replace(job, optimizer=optimizer, skip=history.skip, losses_per_hour=losses_per_hour)


def follow(job: TrainJob, history: History, end: End, max_failures: int, workers: int) -> Decision:
    """Decide what follows the end of an attempt, discard checkpoints accordingly, and store the new history.

    The driver does not reach a data owner's checkpoints: such a training goes back to its newest one, and skips the
    same batches.

    Args:
        job: The training.
        history: History of the attempts before this one.
        end: How the attempt ended.
        max_failures: Maximum number of restarts after failures of workers.
        workers: Number of workers of the attempt.
    """
    checkpoints: list[int] = []
    if end.kind in retrying.MAY_GO_BACK and job.owner is None:
        try:
            checkpoints = checkpoint.steps(job.checkpoints)
        except StorageError as error:  # without the list of checkpoints, the training can only start over
            end = End("storage", end.step, str(error))
    limits = retrying.Limits(max_failures, window=retrying.window_of(job.steps))
    if end.kind == "out_of_memory":
        # `decide` halves the micro-batch. Start from the one that really ran, which is at most the worker's share of
        # the batch.
        history = dataclasses.replace(history, micro_batch=min(history.micro_batch, _share(job, workers)))
    decision = retrying.decide(history, end, checkpoints, limits)
    if isinstance(decision, GoBack) and job.owner is None:
        checkpoint.discard_after(job.checkpoints, decision.checkpoint)
    if not isinstance(decision, GiveUp):
        path = _path(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(decision.history))
        job.store.publish(path)
    return decision


def changes_in_words(before: History, after: History) -> str:
    """What a training continues with after it ran out of memory; empty if nothing changed."""
    if after.recompute and not before.recompute:
        return "; it continues with gradient_checkpointing=true"
    if after.micro_batch != before.micro_batch:
        return f"; it continues with micro_batch={after.micro_batch}"
    return ""


def remembered(job: TrainJob, workers: int) -> History:
    """The training's history of attempts, as an earlier driver stored it; a new one if none is stored.

    Args:
        job: The training.
        workers: Minimum number of workers that share the batch of the training.
    """
    path = _path(job)
    if not path.exists():
        share = _share(job, workers)
        open_to_recompute = False if job.optimizer.gradient_checkpointing is None else None
        return History(micro_batch=min(job.optimizer.micro_batch or share, share), recompute=open_to_recompute)
    values = read_json(path)
    skip = values.pop("skip")
    return History(**values, skip=Skip(**skip) if skip else None)


def newest_checkpoint(job: TrainJob) -> int | None:
    """Step of the newest checkpoint, 0 if there is none; the step only orders the queue.

    None if the storage does not respond, or belongs to a data owner.
    """
    if job.owner is not None:
        return None
    with contextlib.suppress(StorageError):
        return max(checkpoint.steps(job.checkpoints), default=0)
    return None


def _share(job: TrainJob, workers: int) -> int:
    """Number of sequences that one worker processes in a step."""
    return -(-job.batch // workers)


def _path(job: TrainJob) -> Path:
    return job.output.parent / "history.json"
