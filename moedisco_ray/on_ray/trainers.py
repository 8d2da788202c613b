"""Trainings as a queue over a pool that breathes: as many at once as it has room for now, the longest remaining first."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import ray

from moedisco_ray.artifacts import read_json, write_json
from moedisco_ray.errors import StorageError, TrainingError
from moedisco_ray.events import Emit, Event
from moedisco_ray.on_ray import session
from moedisco_ray.on_ray.attempts import Surroundings, attempt
from moedisco_ray.on_ray.relay import relay
from moedisco_ray.policies import retrying
from moedisco_ray.policies.checkpointing import HOUR, loss_rate
from moedisco_ray.policies.ordering import Remaining, longest_first
from moedisco_ray.policies.retrying import Again, End, GiveUp, GoBack, History, Skip
from moedisco_ray.shell import Placement, Trained
from moedisco_ray.stopping import NEVER, StopFile
from moedisco_ray.training import TrainJob, TrainResult, checkpoint

_LOOK_SECONDS = 1.0
"""Between two looks at the pool's room."""

Outcome = TrainResult | End


def train_all(
    jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit, stop: StopFile = NEVER, run: str = "run",
) -> list[Trained]:
    """Train every job; those that wait, or whose machine was taken away, hold nothing.

    Args:
        jobs: Results come in their order.
        placement: Where.
        directory: For Ray Train's own state, and the flag that stops the trainers; all nodes must see it.
        emit: Receives the workers' events.
        stop: Asks the trainers to end.
        run: Begins the names of the Ray Train runs.

    Raises:
        MoeDiscoError: The first job's error that is ours, such as a full disk.
        TrainingError: A worker died more often than allowed, or a training is poisoned.
        RunStopped: Somebody asked the run to end; the trainers have saved a checkpoint and ended.
        KeyboardInterrupt: The same, from the keyboard.
    """
    directory.mkdir(parents=True, exist_ok=True)
    end = StopFile(directory / f"stop-{uuid.uuid4().hex}")
    with relay(emit) as mail, ThreadPoolExecutor(len(jobs), thread_name_prefix="trainer") as threads:
        queue = _Queue(jobs, Surroundings(run, placement, directory, (stop, end), mail), threads)
        try:
            while not queue.done:
                stop.check()
                queue.start()
                queue.settle()
        finally:
            # Whatever ends the queue ends its trainers, each with a checkpoint, before the executor waits for them.
            if not queue.done:
                end.request("ended")
        return [queue.results[job.name] for job in jobs]


class _Queue:
    """What waits, what runs, and what is finished."""

    def __init__(self, jobs: Sequence[TrainJob], around: Surroundings, threads: ThreadPoolExecutor) -> None:
        self.results: dict[str, Trained] = {}
        self._around = around
        self._threads = threads
        self._waiting = {job.name: job for job in jobs}
        self._running: dict[Future[Outcome], TrainJob] = {}
        self._histories = {job.name: _remembered(job, around.placement) for job in jobs}
        self._said_empty = False
        self._losses = 0

    @property
    def done(self) -> bool:
        """Whether every job is finished."""
        return not self._waiting and not self._running

    def start(self) -> None:
        """Begin as many as there is room for, the one with most to do first."""
        placement = self._around.placement
        room = session.room(placement.pool, placement.workers)
        if not room and not self._running:
            self._say_empty()
        free = room - len(self._running)
        if free <= 0:
            return
        order = longest_first([
            Remaining(job.name, job.steps - _reached(job), planned=1.0, measured=self._around.mail.step_seconds(job.name))
            for job in self._waiting.values()])
        for unit in order[:free]:
            job = self._waiting.pop(unit.name)
            adjusted = _adjusted(job, self._histories[job.name], self._losses_per_hour())
            self._running[self._threads.submit(attempt, adjusted, self._around)] = job

    def settle(self) -> None:
        """Wait a moment for trainings to end, and see to those that did."""
        done, _ = wait(self._running, timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED")
        for future in done:
            job = self._running.pop(future)
            outcome = future.result()
            if isinstance(outcome, End):
                self._follow(job, outcome)
            elif not outcome.finished:
                self._around.stops[0].check()
                self._waiting[job.name] = job
            else:
                self.results[job.name] = _trained(job, outcome, self._around)

    def _follow(self, job: TrainJob, end: End) -> None:
        """Do what the policy says of an end."""
        limits = retrying.Limits(self._around.placement.max_failures, window=retrying.window_of(job.steps))
        steps = [] if end.kind == "storage" else checkpoint.steps(job.checkpoints)
        self._losses += end.kind in ("died", "preempted") and not end.saved
        decision = retrying.decide(self._histories[job.name], end, steps, limits)
        if isinstance(decision, GiveUp):
            raise TrainingError(f"{job.name}: {decision.reason}")
        if isinstance(decision, GoBack):
            checkpoint.discard_after(job.checkpoints, decision.checkpoint)
        self._remember(job, decision)
        self._tell(Event("worker_restarted", job.stage, job.name, {"kind": end.kind, "step": end.step, "reason": end.reason}))
        self._waiting[job.name] = job

    def _remember(self, job: TrainJob, decision: Again | GoBack) -> None:
        self._histories[job.name] = decision.history
        path = _memory(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(decision.history))

    def _losses_per_hour(self) -> float:
        seconds = sum(self._around.mail.worker_seconds(name) for name in self._histories)
        return loss_rate(self._losses, seconds / HOUR)

    def _say_empty(self) -> None:
        if not self._said_empty:
            self._said_empty = True
            pool = self._around.placement.pool
            self._tell(Event("warning", data={"message": f"waits for {pool.resource}: no node of the cluster offers it now"}))

    def _tell(self, event: Event) -> None:
        ray.get(self._around.mail.handle.push.remote(event))


def _trained(job: TrainJob, result: TrainResult, around: Surroundings) -> Trained:
    worker_seconds = around.mail.worker_seconds(job.name)
    seconds = worker_seconds / around.placement.workers
    ray.get(around.mail.handle.push.remote(Event("unit_finished", job.stage, job.name, {
        "steps": result.steps, "tokens": result.tokens, "loss": result.loss, "seconds": round(seconds, 3),
        "restored_step": result.restored_step})))
    return Trained(result, seconds, worker_seconds)


def _reached(job: TrainJob) -> int:
    with contextlib.suppress(StorageError):     # which is no reason to end a run here: the order alone hangs on it
        return max(checkpoint.steps(job.checkpoints), default=0)
    return 0


def _adjusted(job: TrainJob, history: History, losses_per_hour: float) -> TrainJob:
    """The job as its history has it: a smaller micro-batch, batches that are left out, and checkpoints as losses ask for."""
    optimizer = job.optimizer.model_copy(update={"micro_batch": history.micro_batch})
    return dataclasses.replace(job, optimizer=optimizer, skip=history.skip, losses_per_hour=losses_per_hour)


def _memory(job: TrainJob) -> Path:
    return job.output.parent / "history.json"


def _remembered(job: TrainJob, placement: Placement) -> History:
    """What an earlier driver learned of a job."""
    path = _memory(job)
    if not path.exists():
        share = -(-job.batch // placement.workers)
        return History(micro_batch=min(job.optimizer.micro_batch or share, share))
    values = read_json(path)
    skip = values.pop("skip")
    return History(**values, skip=Skip(**skip) if skip else None)
