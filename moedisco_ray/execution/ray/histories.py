"""What the next attempt at a training must know of the earlier ones, kept beside its output."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moedisco_ray.core.artifacts import read_json, write_json
from moedisco_ray.core.errors import StorageError
from moedisco_ray.policies import retrying
from moedisco_ray.policies.checkpointing import ASSUMED
from moedisco_ray.policies.retrying import Decision, End, GiveUp, GoBack, History, Skip
from moedisco_ray.training import TrainJob
from moedisco_ray.training.checkpoints import checkpoint


def adjusted(job: TrainJob, history: History, losses_per_hour: float = ASSUMED.per_hour) -> TrainJob:
    """The job as its history has it: a smaller micro-batch, batches that are left out, and checkpoints as losses ask for."""
    optimizer = job.optimizer.model_copy(update={"micro_batch": history.micro_batch})
    return dataclasses.replace(job, optimizer=optimizer, skip=history.skip, losses_per_hour=losses_per_hour)


def follow(job: TrainJob, history: History, end: End, max_failures: int, workers: int) -> Decision:
    """Do to a job's files what the policy says of an end, and remember it.

    Args:
        job: Whose attempt ended.
        history: Of that attempt.
        end: How it ended.
        max_failures: How often workers that failed are started again.
        workers: Of that attempt.
    """
    checkpoints: list[int] = []
    if end.kind in retrying.MAY_GO_BACK:
        try:
            checkpoints = checkpoint.steps(job.checkpoints)
        except StorageError as error:   # nobody knows where to go back to: what is poisoned will end like this again
            end = End("storage", end.step, str(error))
    limits = retrying.Limits(max_failures, window=retrying.window_of(job.steps))
    if end.kind == "out_of_memory":     # no pass was larger than a worker's share, and half of what was too much is to follow
        history = dataclasses.replace(history, micro_batch=min(history.micro_batch, _share(job, workers)))
    decision = retrying.decide(history, end, checkpoints, limits)
    if isinstance(decision, GoBack):
        checkpoint.discard_after(job.checkpoints, decision.checkpoint)
    if not isinstance(decision, GiveUp):
        remember(job, decision.history)
    return decision


def remember(job: TrainJob, history: History) -> None:
    """Keep a job's history for a later driver."""
    path = _memory(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, dataclasses.asdict(history))


def remembered(job: TrainJob, workers: int) -> History:
    """What an earlier driver learned of a job; else, that nothing has happened yet.

    Args:
        job: The training.
        workers: The fewest that share its batch.
    """
    path = _memory(job)
    if not path.exists():
        share = _share(job, workers)
        return History(micro_batch=min(job.optimizer.micro_batch or share, share))
    values = read_json(path)
    skip = values.pop("skip")
    return History(**values, skip=Skip(**skip) if skip else None)


def _share(job: TrainJob, workers: int) -> int:
    """Sequences per step of one of so many workers."""
    return -(-job.batch // workers)


def _memory(job: TrainJob) -> Path:
    return job.output.parent / "history.json"
