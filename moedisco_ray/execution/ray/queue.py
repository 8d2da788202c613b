"""A queue over a pool that breathes: as many at once as it has room for now, the longest remaining first."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import ray

from moedisco_ray.backend import Trained
from moedisco_ray.core.config import Pool
from moedisco_ray.core.errors import StorageError
from moedisco_ray.core.events import Event
from moedisco_ray.execution.ray import histories, session
from moedisco_ray.execution.ray.attempts import AttemptContext, attempt
from moedisco_ray.execution.ray.autoscaling.demand import Demand
from moedisco_ray.execution.ray.event_mailbox import UnitStatus
from moedisco_ray.execution.ray.sync_thread import KeeperBeside
from moedisco_ray.execution.ray.wait_notice import PATIENCE_SECONDS, WaitNotice
from moedisco_ray.execution.submodel_progress import SubmodelProgress
from moedisco_ray.policies.checkpointing import HOUR, SaveCost, expected_stretch, interval
from moedisco_ray.policies.ordering import Remaining, calibration, expected_seconds, longest_first, soonest_done
from moedisco_ray.policies.placement import Need, ask_for, place_all
from moedisco_ray.policies.retrying import End, GiveUp
from moedisco_ray.training import TrainJob, TrainResult
from moedisco_ray.training.checkpoints import checkpoint

_LOOK_SECONDS = 1.0
"""Between two looks at the pool's room."""
_START_SECONDS = 60.0
"""For which slots may be taken by trainers of ours that start, and are not heard of yet."""
_RESTART_SECONDS = 30.0
"""From a slot to the next step of a training that had lost its own."""
_GRACE_SECONDS = 120.0
"""For trainers that are asked to end, to save a checkpoint."""

Outcome = TrainResult | End


class Queue:
    """What waits, and what runs.

    Args:
        jobs: To be trained, each by as many workers.
        around: What their attempts share.
        threads: One for each job, and one more.
        submodel_progress: Is told what becomes of them.

    Raises:
        PoolError: A job fits no node type of a mixed pool.
    """

    def __init__(
        self, jobs: Sequence[TrainJob], around: AttemptContext, threads: ThreadPoolExecutor, submodel_progress: SubmodelProgress,
    ) -> None:
        self._jobs = jobs
        self._around = around
        self._threads = threads
        self._cohort = submodel_progress
        self._pools = {kind.key: kind for kind in around.placement.pool.kinds}
        self._demand = Demand(self._pools, f"{around.run}-waiting") if session.grows() else None
        self._waiting: dict[str, TrainJob] = {}
        self._reached = dict.fromkeys((job.name for job in jobs), 0)
        self._returning: dict[Future[int | None], TrainJob] = {}
        self._running: dict[Future[Outcome], tuple[TrainJob, Pool]] = {}
        self._histories = {job.name: histories.remembered(job, around.placement.workers) for job in jobs}
        self._needs = {job.name: self._need(job) for job in jobs}
        self._standstill = WaitNotice(self._tell)
        self._rounds = KeeperBeside(jobs, threads, self._tell)
        around.placement.check(list(self._needs.values()))
        for job in jobs:
            if job.name in submodel_progress.finished:
                self._tell_finished(job)
            else:
                self._wait(job)
        wait(self._returning)
        self._queue_up()

    @property
    def worth_waiting(self) -> bool:
        """Whether something is to be waited for.

        Raises:
            TrainingError: Too many gave up.
        """
        fastest = max(pool.speed for pool in self._pools.values())
        speeds = {job.name: fastest for job in self._jobs} | {job.name: pool.speed for job, pool in self._running.values()}
        return self._cohort.verdict(speeds).action == "wait"

    @property
    def results(self) -> list[Trained]:
        """Every job as it has ended, or stands."""
        held = self._around.mail.held()
        return [self._cohort.trained(job, held) for job in self._jobs]

    @property
    def left(self) -> tuple[list[float], list[float]]:
        """Seconds of work left of what runs and of what waits; infinite until one of them was timed."""
        seen = {job.name: self._around.mail.whereabouts(job.name) for job in self._jobs}
        timed = [Remaining(name, 1, 1.0, where.step_seconds) for name, where in seen.items() if where.step_seconds]
        factor = calibration(timed) if timed else math.inf
        running = [self._remaining(job, seen[job.name], seen[job.name].step) for job, _ in self._running.values()]
        waiting = longest_first([self._remaining(job, seen[job.name]) for job in self._waiting.values()], factor)
        return [expected_seconds(unit, factor) for unit in running], [expected_seconds(unit, factor) for unit in waiting]

    @property
    def stretch(self) -> float:
        """What losses and checkpoints add to the seconds of work that are left, as a factor."""
        seen = [self._around.mail.whereabouts(job.name) for job in self._jobs]
        cost = SaveCost(max((where.stall for where in seen), default=0.0))
        restart = _RESTART_SECONDS + (0.0 if self._demand is None else self._demand.boot)
        rate = self._around.mail.losses_per_hour()
        return expected_stretch(interval(cost, rate), cost.stall, HOUR / rate, restart)

    def start(self) -> None:
        """Begin as many as there is room for, the one with most to do first, each where it fits for the least money."""
        placement = self._around.placement
        room = session.room(placement.pool, placement.workers)
        free = {key: session.room(pool, placement.workers) - self._taken[key] for key, pool in self._pools.items()}
        order = self._order(room)
        placed = place_all(order, placement.types(free))
        for_all = room >= len(self._waiting) + len(self._running) + len(self._returning)
        for name, key in itertools.islice(placed.items(), max(0, room - len(self._running))):
            job, pool = self._waiting.pop(name), self._pools[key]
            around = dataclasses.replace(self._around, placement=placement.on(pool))
            adjusted = histories.adjusted(job, self._histories[name], self._around.mail.losses_per_hour())
            adjusted = self._rounds.seated(adjusted, for_all=for_all)
            self._running[self._threads.submit(attempt, adjusted, around)] = job, pool
        self._ask([need for need in order if need.name in self._waiting])
        self._look_for_standstill()

    def settle(self) -> None:
        """Wait a moment for trainings to end, and see to those that did."""
        self._rounds.look()
        futures: list[Future[Any]] = [*self._running, *self._returning, *self._rounds.at_work]
        if not futures:     # of nothing, `wait` returns at once
            time.sleep(_LOOK_SECONDS)
        wait(futures, timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED")
        done = [future for future in self._running if future.done()]
        for future in done:
            job, pool = self._running.pop(future)
            outcome = future.result()
            if isinstance(outcome, End):
                self._follow(job, outcome)
            elif not outcome.finished:
                self._around.stops[0].check()
                self._wait(job)
            else:
                self._finish(job, outcome, pool)
        self._queue_up()
        self._cohort.note(self._around.mail.held, now=bool(done))

    def await_ends(self) -> None:
        """Wait for those that were asked to end, which save a checkpoint first; kill who waits for slots, or hangs."""
        if self._demand is not None:
            self._demand.ask({})
        deadline = time.monotonic() + _GRACE_SECONDS
        while hung := wait(self._running, timeout=_LOOK_SECONDS).not_done:
            for name in [self._running[future][0].name for future in hung]:
                if time.monotonic() >= deadline or not self._around.mail.whereabouts(name).nodes:
                    self._around.mail.kill(name)
        self._cohort.note(self._around.mail.held, now=True)

    def let_go(self) -> None:
        """Take leave of what is not waited for: those that train were asked to end, and save a checkpoint first."""
        self.await_ends()
        for future, (job, pool) in self._running.items():
            outcome = future.result()
            if isinstance(outcome, TrainResult) and outcome.finished:
                self._finish(job, outcome, pool)
        self._running.clear()
        for job, trained in zip(self._jobs, self.results, strict=True):
            if trained.contribution != "finished":
                self._tell(Event("unit_let_go", job.stage, job.name, {
                    "contribution": trained.contribution, "steps": trained.result.steps, "tokens": trained.result.tokens,
                    "reason": trained.reason}))
        self._cohort.note(self._around.mail.held, now=True)

    @property
    def _taken(self) -> Counter[str]:
        """Trainings under way on each node type."""
        return Counter(pool.key for _, pool in self._running.values())

    def _order(self, room: int) -> list[Need]:
        """What waits and could start, in the order in which it should, with so many slots for all."""
        startable = [job for job in self._waiting.values() if self._rounds.startable(job)]
        if not startable:
            return []
        seen = {job.name: self._around.mail.whereabouts(job.name) for job in self._jobs}
        waiting = [self._remaining(job, seen[job.name]) for job in startable]
        running = [self._remaining(job, seen[job.name], seen[job.name].step) for job, _ in self._running.values()]
        factor = calibration([*waiting, *running])
        order = soonest_done(waiting, [expected_seconds(unit, factor) for unit in running], room, factor)
        return [self._needs[unit.name] for unit in order]

    def _ask(self, order: Sequence[Need]) -> None:
        """Ask an autoscaler for the nodes of what waits; those of a type that does not come, of the next one that fits."""
        if self._demand is None:
            return
        placement, workers = self._around.placement, self._around.placement.workers
        types = placement.types({key: session.cap(kind) // workers - self._taken[key] for key, kind in self._pools.items()})
        found = ask_for(order, types, self._demand.absent)
        left = max(0, session.cap(placement.pool) // workers - len(self._running))
        asked = Counter([found[need.name] for need in order if need.name in found][:left])
        self._demand.ask({key: count * workers for key, count in asked.items()})

    def _finish(self, job: TrainJob, result: TrainResult, pool: Pool) -> None:
        self._cohort.finish(job.name, result, pool.speed)
        self._tell_finished(job)

    def _follow(self, job: TrainJob, end: End) -> None:
        """Do what the policy says of an end."""
        placement = self._around.placement
        decision = histories.follow(job, self._histories[job.name], end, placement.max_failures, placement.workers)
        if isinstance(decision, GiveUp):
            self._cohort.give_up(job.name, decision.reason, diverged=decision.poisoned)
            self._rounds.drop(job)
            return
        self._histories[job.name] = decision.history
        self._needs[job.name] = self._need(job)
        self._tell(Event("worker_restarted", job.stage, job.name, {"kind": end.kind, "step": end.step, "reason": end.reason}))
        self._wait(job)

    def _wait(self, job: TrainJob) -> None:
        """Put a job into the queue, once it is known what it has saved: a storage is slow to ask, and may be away."""
        self._returning[self._threads.submit(_newest, job)] = job

    def _queue_up(self) -> None:
        for future in [future for future in self._returning if future.done()]:
            job, reached = self._returning.pop(future), future.result()
            self._waiting[job.name] = job
            if reached is not None:
                self._reached[job.name] = reached

    def _remaining(self, job: TrainJob, where: UnitStatus, step: int = 0) -> Remaining:
        steps = max(1, job.steps - max(step, self._reached[job.name]))      # the last one made, the model is still to be written
        return Remaining(job.name, steps, planned=1.0, measured=where.step_seconds)

    def _need(self, job: TrainJob) -> Need:
        return self._around.placement.need(histories.adjusted(job, self._histories[job.name]))

    def _look_for_standstill(self) -> None:
        """Say what is waited for while no training has a worker, or will have one soon."""
        placement, mail = self._around.placement, self._around.mail
        running = [job.name for job, _ in self._running.values()]
        if any(mail.whereabouts(name).nodes for name in running):
            self._standstill.goes_on()
            return
        # What has begun waits for slots of its own node type, whatever is free of another.
        need_gb = min((self._needs[name].memory_gb for name in self._waiting), default=0.0)
        begun = {pool.key for _, pool in self._running.values()}
        fitting = [kind for key, kind in self._pools.items() if (key in begun if begun else kind.memory_gb >= need_gb)]
        bundles = [placement.on(pool).bundle for pool in fitting]
        free = sum(session.free(bundle) for bundle in bundles)
        if free:
            self._standstill.goes_on()
        else:
            patience = _START_SECONDS if any(session.lasting(pool) for pool in fitting) else PATIENCE_SECONDS
            self._standstill.waits(lambda: session.missing(bundles, placement.workers, free), patience)

    def _tell_finished(self, job: TrainJob) -> None:
        trained = self._cohort.trained(job, self._around.mail.held())
        self._tell(Event("unit_finished", job.stage, job.name, {
            "steps": trained.result.steps, "tokens": trained.result.tokens, "loss": trained.result.loss,
            "seconds": round(trained.seconds, 3), "restored_step": trained.result.restored_step}))

    def _tell(self, event: Event) -> None:
        ray.get(self._around.mail.handle.push.remote(event))


def _newest(job: TrainJob) -> int | None:
    with contextlib.suppress(StorageError):     # no reason to end a run here: the order alone hangs on it
        return max(checkpoint.steps(job.checkpoints), default=0)
    return None
