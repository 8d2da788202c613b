"""What the next attempt at a training must know about the earlier ones, stored next to the training's output."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from moedisco_ray.core.errors import StorageError
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.execution.ray.card_memory import fitted, memory_of
from moedisco_ray.plan.memory import GIB
from moedisco_ray.plan.refit import SHARE, within
from moedisco_ray.policies import retrying
from moedisco_ray.policies.checkpointing import ASSUMED
from moedisco_ray.policies.retrying import Again, Decision, End, GiveUp, GoBack, History, Skip
from moedisco_ray.training import TrainJob, World
from moedisco_ray.training.checkpoints import checkpoint


def adjusted(job: TrainJob, history: History, losses_per_hour: float = ASSUMED.per_hour) -> TrainJob:
    """A copy of the job with its history's memory settings and skipped batches, and the rate of lost workers."""
    changes: dict[str, int | bool | str] = {"micro_batch": history.micro_batch}
    if history.recompute:
        changes["gradient_checkpointing"] = True
    if history.fp8_moments:
        changes["moments"] = "fp8"
    if history.offload_moments:
        changes["offload_moments"] = True
    optimizer = job.optimizer.model_copy(update=changes)
    return dataclasses.replace(job, optimizer=optimizer, skip=history.skip, losses_per_hour=losses_per_hour)


def follow(
    job: TrainJob, history: History, end: End, max_failures: int, workers: int, card_gb: float | None = None
) -> Decision:
    """Decide what follows the end of an attempt, discard checkpoints accordingly, and store the new history.

    The driver does not reach a data owner's checkpoints: such a training goes back to its newest one, and skips the
    same batches.

    Args:
        job: The training.
        history: History of the attempts before this one.
        end: How the attempt ended.
        max_failures: Maximum number of restarts after failures of workers.
        workers: Number of workers of the attempt.
        card_gb: Memory that the workers' GPUs had (GiB); None without GPUs, whose memory a plan does not know.
    """
    checkpoints: list[int] = []
    if end.kind in retrying.MAY_GO_BACK and job.owner is None:
        try:
            checkpoints = checkpoint.steps(job.checkpoints)
        except StorageError as error:  # without the list of checkpoints, the training can only start over
            end = End("storage", end.step, str(error))
    limits = retrying.Limits(max_failures, window=retrying.window_of(job.steps))
    if end.kind == "out_of_memory":
        history = _as_it_ran(job, history, workers, card_gb)
    again = None
    no_cheaper_lever = history.micro_batch <= 1 and history.recompute is not False
    if end.kind == "out_of_memory" and card_gb is not None and (not history.replanned or no_cheaper_lever):
        again = _replanned(job, history, workers, card_gb)
    decision = again or retrying.decide(history, end, checkpoints, limits)
    if isinstance(decision, GoBack) and job.owner is None:
        checkpoint.discard_after(job.checkpoints, decision.checkpoint)
    if not isinstance(decision, GiveUp):
        path = _path(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(decision.history))
        job.store.publish(path)
    return decision


def _as_it_ran(job: TrainJob, history: History, workers: int, card_gb: float | None) -> History:
    """The history with the memory settings of the attempt: at most the worker's share of the batch, fitted to a card.

    What follows must need less than these: other settings would be fitted to the card to be the same ones again.

    Raises:
        CheckpointError: The model of the job cannot be read.
    """
    share = min(history.micro_batch, _share(job, workers))
    if card_gb is None:
        return dataclasses.replace(history, micro_batch=share)
    ran = fitted(adjusted(job, history), World(size=workers), card_gb).optimizer
    return dataclasses.replace(
        history,
        micro_batch=min(share, ran.micro_batch or share),
        recompute=True if history.recompute is False and ran.gradient_checkpointing else history.recompute,
    )


def _replanned(job: TrainJob, history: History, workers: int, card_gb: float) -> Again | None:
    """The settings with 0.93 of a card's memory, and of what was planned; None if nothing makes a training fit there.

    Raises:
        CheckpointError: The model of the job cannot be read.
    """
    now = adjusted(job, history).optimizer
    measure = memory_of(job, workers)
    found = within(
        measure,
        now,
        SHARE * min(card_gb, measure(now).total / GIB),
        sequence_length=job.sequence_length,
        workers=workers,
        alone=workers == 1 and job.sharing is None and job.lora is None,
        has_state=newest_checkpoint(job) != 0,
    )
    if found is None:
        return None
    return Again(
        dataclasses.replace(
            history,
            replanned=True,
            micro_batch=found.micro_batch or history.micro_batch,
            recompute=True if found.gradient_checkpointing else history.recompute,
            fp8_moments=found.moments == "fp8" != job.optimizer.moments,
            offload_moments=bool(found.offload_moments) and not job.optimizer.offload_moments,
        )
    )


def changes_in_words(before: History, after: History) -> str:
    """What a training continues with after it ran out of memory; empty if nothing changed."""
    changed = {
        "micro_batch": after.micro_batch if after.micro_batch != before.micro_batch else None,
        "gradient_checkpointing": "true" if after.recompute and not before.recompute else None,
        "moments": "fp8" if after.fp8_moments and not before.fp8_moments else None,
        "offload_moments": "true" if after.offload_moments and not before.offload_moments else None,
    }
    words = ", ".join(f"{name}={value}" for name, value in changed.items() if value is not None)
    return f"; it continues with {words}" if words else ""


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
