"""What the next attempt at a training must know of the earlier ones, kept beside its output."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from moedisco_ray.artifacts import read_json, write_json
from moedisco_ray.policies.checkpointing import ASSUMED
from moedisco_ray.policies.retrying import History, Skip
from moedisco_ray.training import TrainJob


def adjusted(job: TrainJob, history: History, losses_per_hour: float = ASSUMED.per_hour) -> TrainJob:
    """The job as its history has it: a smaller micro-batch, batches that are left out, and checkpoints as losses ask for."""
    optimizer = job.optimizer.model_copy(update={"micro_batch": history.micro_batch})
    return dataclasses.replace(job, optimizer=optimizer, skip=history.skip, losses_per_hour=losses_per_hour)


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
        share = -(-job.batch // workers)
        return History(micro_batch=min(job.optimizer.micro_batch or share, share))
    values = read_json(path)
    skip = values.pop("skip")
    return History(**values, skip=Skip(**skip) if skip else None)


def _memory(job: TrainJob) -> Path:
    return job.output.parent / "history.json"
