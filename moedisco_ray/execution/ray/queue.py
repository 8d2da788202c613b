"""Queue trainings for a pool that grows and shrinks.

All that fit run at the same time; those with most work left start first.
Sub-models train on one slot each. A gang is a queue of one training, on as many slots as `GangSize` says.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from moedisco_ray.backend import Trained
from moedisco_ray.core.config import Pool
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import histories, session
from moedisco_ray.execution.ray.attempts import AttemptContext, attempt
from moedisco_ray.execution.ray.autoscaling.demand import Demand
from moedisco_ray.execution.ray.forecast import Forecast
from moedisco_ray.execution.ray.gang import GangSize
from moedisco_ray.execution.ray.hang_watch import HangWatch
from moedisco_ray.execution.ray.replacing import Replacements, RunningAttempt
from moedisco_ray.execution.ray.seats import Seat
from moedisco_ray.execution.ray.syncs import SyncThread
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.execution.ray.wait_notice import GRACE_SECONDS, WaitNotice
from moedisco_ray.execution.submodel_progress import SubmodelProgress
from moedisco_ray.policies.ordering import Remaining
from moedisco_ray.policies.placement import Need, place_all
from moedisco_ray.policies.retrying import End, GiveUp
from moedisco_ray.training import TrainJob, TrainResult

POLL_SECONDS = 1.0
"""Interval at which the queue checks trainings and slots, in seconds."""
START_SECONDS = 60.0
"""Seconds to wait before a warning that no slot is free. Trainings of this queue may hold slots before they report
it."""
STOP_SECONDS = 120.0
"""Maximum time that stopped trainers get to save a checkpoint, in seconds."""

Outcome = TrainResult | End


class Queue:
    """The waiting and the running trainings.

    Args:
        jobs: The trainings; a gang has only one job.
        context: Data that all attempts at these trainings share.
        threads: Executor with one thread for each job, and one for syncs.
        progress: Records the outcome of each job.
        gang: Decides the number of workers if the job trains as a gang; None if each job trains with one worker, on a
            seat.

    Raises:
        PoolError: A job fits no node type of a mixed pool.
    """

    def __init__(
        self,
        jobs: Sequence[TrainJob],
        context: AttemptContext,
        threads: ThreadPoolExecutor,
        progress: SubmodelProgress,
        gang: GangSize | None = None,
    ) -> None:
        self._jobs = jobs
        self._context = context
        self._threads = threads
        self._progress = progress
        self._gang = gang
        self._pools = {node_type.key: node_type for node_type in context.placement.pool.node_types}
        self._demand = (
            Demand(self._pools, f"{context.run}-waiting", aside=context.aside)
            if gang is None and session.autoscales()
            else None
        )
        self._waiting: dict[str, TrainJob] = {}
        self._saved_steps = dict.fromkeys((job.name for job in jobs), 0)
        self._queueing: dict[Future[int | None], TrainJob] = {}
        self._running: dict[Future[Outcome], RunningAttempt] = {}
        self._histories = {job.name: histories.remembered(job, context.placement.workers) for job in jobs}
        self._needs = {job.name: self._need(job) for job in jobs}
        self._wait_notice = WaitNotice(context.mailbox.push)
        self._hang_watch = HangWatch(context.mailbox)
        self._replacements = Replacements(context.mailbox, gang)
        self._sync = SyncThread(jobs, threads, context.mailbox)
        context.placement.check(list(self._needs.values()))
        self._begun = self._claimed()
        context.mailbox.begin([job.name for job in jobs], self._begun)
        for job in jobs:
            if job.name in progress.finished:
                self._emit_finished(job)
            elif job.name not in self._begun:
                self._enqueue(job)
        wait(self._queueing)
        self._move_queued()

    def resume(self) -> None:
        """Wait for the trainings that an earlier driver has begun, also if none is to start: else no one ends them."""
        for job in self._jobs:
            if (begun := self._begun.pop(job.name, None)) is not None:
                self._run(job, job, begun[0].pool, 1, begun)

    @property
    def should_wait(self) -> bool:
        """Whether to continue waiting for trainings.

        Raises:
            TrainingError: Too many trainings were given up.
        """
        fastest = max(pool.speed for pool in self._pools.values())
        speeds = {job.name: fastest for job in self._jobs} | {
            each.job.name: each.pool.speed for each in self._running.values()
        }
        return self._progress.verdict(speeds).action == "wait"

    @property
    def results(self) -> list[Trained]:
        """The result of every job so far, in the jobs' order."""
        held = self._context.mailbox.held()
        return [self._progress.trained(job, held) for job in self._jobs]

    @property
    def seconds_left(self) -> tuple[list[float], list[float]]:
        """Expected seconds left of each running training, and of each waiting one; see `Forecast.seconds_left`."""
        return self._forecast(self._waiting.values()).seconds_left()

    @property
    def stretch(self) -> float:
        """Factor by which lost nodes and checkpoints are expected to lengthen the remaining time."""
        boot = 0.0 if self._demand is None else self._demand.boot_seconds
        return self._forecast(self._waiting.values()).stretch(self._context.mailbox.losses_per_hour(), boot)

    def start(self) -> None:
        """Begin all trainings that fit, most work first, each on the cheapest node type with enough memory.

        Raises:
            CardError: torch can use no GPU of the pool, and no autoscaler brings others.
        """
        if self._waiting:
            pool = self._context.placement.pool
            self._context.aside.check(pool, self._context.placement.workers * pool.slots)
        room = self._room(self._context.placement.pool)
        order = self._order(room)
        slot_for_each = self._slot_for_each(room)
        placed = self._placed(order, room)
        if placed and self._demand is not None:
            self._demand.hand_over()
        for name, pool, workers in placed:
            job = self._waiting.pop(name)
            adjusted = histories.adjusted(job, self._histories[name], self._context.mailbox.losses_per_hour())
            self._run(job, self._sync.with_stay(adjusted, slot_for_each=slot_for_each), pool, workers)
        if self._demand is not None:
            self._demand.request_for(
                [need for need in order if need.name in self._waiting], self._context.placement, self._taken
            )
        self._update_wait_notice()

    def poll(self) -> None:
        """Wait for a moment, and handle the trainings that ended."""
        self._sync.poll()
        self._hang_watch.check([job.name for job in self._running_jobs])
        futures: list[Future[Any]] = [*self._running, *self._queueing, *self._sync.pending]
        if not futures:  # `wait` returns at once without futures
            time.sleep(POLL_SECONDS)
        wait(futures, timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
        done = [future for future in self._running if future.done()]
        for future in done:
            ended = self._running.pop(future)
            outcome = future.result()
            if isinstance(outcome, End):
                self._handle_end(ended, self._hang_watch.end_of(ended.job.name, outcome))
            elif not outcome.finished:
                self._context.stop_files[0].check()
                self._enqueue(ended.job)
            else:
                self._finish(ended.job, outcome, ended.pool)
        aside = self._context.aside.of(self._context.placement.pool)
        waiting = bool(self._waiting or self._queueing)
        self._replacements.end_slow(list(self._running.values()), waiting=waiting, aside=aside)
        self._move_queued()
        self._progress.save(self._context.mailbox.held, now=bool(done))

    def wait_for_ends(self) -> None:
        """Wait until trainings asked to end have saved a checkpoint; kill those that wait for slots or hang."""
        if self._demand is not None:
            self._demand.request({})
        if self._gang is not None:
            self._gang.request(0)
        deadline = time.monotonic() + STOP_SECONDS
        while running := wait(self._running, timeout=POLL_SECONDS).not_done:
            for name in [self._running[future].job.name for future in running]:
                if time.monotonic() >= deadline or not self._context.mailbox.status(name).nodes:
                    self._context.mailbox.kill_attempt(name)
        self._progress.save(self._context.mailbox.held, now=True)

    def leave_unfinished(self) -> None:
        """Wait until the running trainings, asked to end, have saved a checkpoint; then report the unfinished ones."""
        self.wait_for_ends()
        for future, ended in self._running.items():
            outcome = future.result()
            if isinstance(outcome, TrainResult) and outcome.finished:
                self._finish(ended.job, outcome, ended.pool)
        self._running.clear()
        for job, trained in zip(self._jobs, self.results, strict=True):
            if trained.contribution != "finished":
                self._context.mailbox.push(
                    Event(
                        "unit_let_go",
                        job.stage,
                        job.name,
                        {
                            "contribution": trained.contribution,
                            "steps": trained.result.steps,
                            "tokens": trained.result.tokens,
                            "reason": trained.reason,
                        },
                    )
                )
        self._progress.save(self._context.mailbox.held, now=True)

    def _claimed(self) -> dict[str, tuple[Seat, str]]:
        """Seats on which an earlier driver has begun trainings that are not finished, by the trainings' names."""
        if self._context.seats is None:
            return {}
        wanted = {job.name: str(job.checkpoints) for job in self._jobs if job.name not in self._progress.finished}
        return self._context.seats.claimed(wanted, self._pools)

    def _run(
        self, job: TrainJob, adjusted: TrainJob, pool: Pool, workers: int, begun: tuple[Seat, str] | None = None
    ) -> None:
        """Start an attempt at a training, or wait for the one that an earlier driver has begun."""
        aside = self._context.aside.of(self._context.placement.pool)
        end = StopFile(self._context.directory / f"end-{uuid.uuid4().hex}")
        context = dataclasses.replace(
            self._context,
            placement=dataclasses.replace(self._context.placement, pool=pool, workers=workers),
            stop_files=(*self._context.stop_files, end),
            begun=begun,
            avoided=self._replacements.avoided(job.name, pool, list(self._running.values()), aside),
        )
        self._progress.workers[job.name] = workers * pool.slots
        running = RunningAttempt(job, pool, workers, self._context.mailbox.status(job.name), end)
        self._running[self._threads.submit(attempt, adjusted, context)] = running

    @property
    def _running_jobs(self) -> list[TrainJob]:
        return [each.job for each in self._running.values()]

    @property
    def _taken(self) -> Counter[str]:
        return Counter(each.pool.key for each in self._running.values())

    def _room(self, pool: Pool) -> int:
        return self._context.aside.room(pool)

    def _forecast(self, waiting: Iterable[TrainJob]) -> Forecast:
        status = self._context.mailbox.statuses([job.name for job in self._jobs])
        return Forecast(
            [self._remaining(job, status[job.name], status[job.name].step) for job in self._running_jobs],
            [self._remaining(job, status[job.name]) for job in waiting],
            status,
        )

    def _order(self, room: int) -> list[Need]:
        """Memory needs of the waiting trainings that could start, in the order in which to start them."""
        startable = [job for job in self._waiting.values() if self._sync.startable(job)]
        return [self._needs[name] for name in self._forecast(startable).order(room)] if startable else []

    def _slot_for_each(self, room: int) -> bool:
        """Whether every unfinished training has a slot that it may use."""
        unfinished = [*self._waiting.values(), *self._running_jobs, *self._queueing.values()]
        slots: Counter[str | None] = Counter()
        for pool in self._pools.values():
            slots[pool.owner] += self._room(pool)
        return room >= len(unfinished) and Counter(job.owner for job in unfinished) <= slots

    def _placed(self, order: Sequence[Need], room: int) -> list[tuple[str, Pool, int]]:
        """Name, node type and number of workers of each training that starts now."""
        if self._gang is not None:
            workers = self._gang.to_start() if order else None
            return [] if workers is None else [(order[0].name, self._context.placement.pool, workers)]
        free = {key: self._room(pool) - self._taken[key] for key, pool in self._pools.items()}
        placed = place_all(order, self._context.placement.types(free))
        return [
            (name, self._pools[key], 1)
            for name, key in itertools.islice(placed.items(), max(0, room - len(self._running)))
        ]

    def _finish(self, job: TrainJob, result: TrainResult, pool: Pool) -> None:
        self._progress.finish(job.name, result, pool.speed)
        self._emit_finished(job)

    def _handle_end(self, ended: RunningAttempt, end: End) -> None:
        job = ended.job
        if self._gang is not None:
            self._gang.forget_growth()
        max_failures = self._context.placement.max_failures
        before = self._histories[job.name]
        card_gb = None
        if ended.pool.gpu:
            card_gb = min(ended.pool.memory_gb, self._context.mailbox.status(job.name).card_gb or math.inf)
        decision = histories.follow(job, before, end, max_failures, workers=ended.workers, card_gb=card_gb)
        if isinstance(decision, GiveUp):
            self._progress.give_up(job.name, decision.reason, diverged=decision.diverged)
            self._sync.drop(job)
            return
        self._histories[job.name] = decision.history
        self._needs[job.name] = self._need(job)
        if end.kind != "bad_card" or end.step is not None:  # else nothing has begun, and a warning has said so
            reason = end.reason + histories.changes_in_words(before, decision.history)
            restarted = {"kind": end.kind, "step": end.step, "reason": reason}
            self._context.mailbox.push(Event("worker_restarted", job.stage, job.name, restarted))
        self._enqueue(job)

    def _enqueue(self, job: TrainJob) -> None:
        """Queue a job once its newest checkpoint is known.

        A thread looks for the checkpoint: storage may be slow or down.
        """
        self._queueing[self._threads.submit(histories.newest_checkpoint, job)] = job

    def _move_queued(self) -> None:
        for future in [future for future in self._queueing if future.done()]:
            job, step = self._queueing.pop(future), future.result()
            self._waiting[job.name] = job
            if step is not None:
                self._saved_steps[job.name] = step

    def _remaining(self, job: TrainJob, status: UnitStatus, step: int = 0) -> Remaining:
        # after the last step the model must still be written
        steps = max(1, job.steps - max(step, self._saved_steps[job.name]))
        return Remaining(job.name, steps, planned=1.0, measured=status.step_seconds)

    def _need(self, job: TrainJob) -> Need:
        return self._context.placement.need(histories.adjusted(job, self._histories[job.name]))

    def _update_wait_notice(self) -> None:
        """Warn about missing slots if no training has a worker, and none will get one soon."""
        placement, mailbox = self._context.placement, self._context.mailbox
        running = [job.name for job in self._running_jobs]
        if any(status.nodes for status in mailbox.statuses(running).values()):
            self._wait_notice.reset()
            return
        # A training that has begun waits for slots of its own node type, even if slots of another are free.
        need_gb = min((self._needs[name].memory_gb for name in self._waiting), default=0.0)
        begun = self._taken
        owners = {job.owner for job in self._waiting.values()}
        fitting = [
            pool
            for key, pool in self._pools.items()
            if (key in begun if begun else pool.memory_gb >= need_gb and pool.owner in owners)
        ]
        bundles = [placement.on(pool).bundle for pool in fitting]
        aside = self._context.aside.of(placement.pool)
        free = sum(session.free_workers(bundle, aside) for bundle in bundles)
        if free >= placement.workers:
            self._wait_notice.reset()
        else:
            grace = (
                START_SECONDS
                if running and any(session.slots_staying(pool, aside) for pool in fitting)
                else GRACE_SECONDS
            )
            self._wait_notice.waiting(lambda: session.wait_message(bundles, placement.workers, free, aside), grace)

    def _emit_finished(self, job: TrainJob) -> None:
        trained = self._progress.trained(job, self._context.mailbox.held())
        self._context.mailbox.push(
            Event(
                "unit_finished",
                job.stage,
                job.name,
                {
                    "steps": trained.result.steps,
                    "tokens": trained.result.tokens,
                    "loss": trained.result.loss,
                    "seconds": round(trained.seconds, 3),
                    "restored_step": trained.result.restored_step,
                },
            )
        )
