"""One attempt at a training: a Ray Train run that ends with a result, or with the reason why its workers ended early.

Ray Train retries nothing here. `policies.retrying` decides what follows, and a training that waits for its next attempt holds no
slot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from moedisco_ray.backend import Placement
from moedisco_ray.core.errors import MoeDiscoError, NotFiniteError, PoolError, StorageError
from moedisco_ray.core.events import Emit, Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray.causes import dead_nodes, end_of
from moedisco_ray.execution.ray.event_mailbox import EventMailbox, attempt_emitter, loss_rate_reader
from moedisco_ray.execution.ray.ray_train_internals import InsufficientClusterResourcesError
from moedisco_ray.execution.ray.train_callbacks import SlotReporter
from moedisco_ray.policies.retrying import End
from moedisco_ray.training import TrainJob, TrainResult, World, train

_COLLECTIVE_SECONDS = 300
"""Timeout of a collective operation (s): torch's own, 30 minutes, is too long for a hang."""
_NOTICE_SECONDS = 1.0
"""Minimum interval between two checks for a preemption notice (s): each check is a message to another process."""
_MAX_STARTS = 5
"""Consecutive failed starts of a worker group before Ray Train gives up."""
_LAST_MESSAGE_SECONDS = 10.0
"""Timeout of a worker's last message to the driver (s): the driver's machine may be gone."""
_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttemptContext:
    """What the attempts of a run share.

    Attributes:
        run: Prefix of the Ray Train runs' names.
        placement: Pool and number of the workers.
        directory: Directory of Ray Train's own state; all nodes must see it.
        stop_files: The attempts end as soon as one of these files exists.
        mailbox: Carries the workers' events to the driver.
        wait_for_slots: Whether an attempt waits minutes for slots that an autoscaler may bring; else it needs free slots.
    """

    run: str
    placement: Placement
    directory: Path
    stop_files: tuple[StopFile, ...]
    mailbox: EventMailbox
    wait_for_slots: bool = True


def attempt(job: TrainJob, context: AttemptContext) -> TrainResult | End:
    """Train until the job is finished or its workers end.

    Returns:
        The result, unfinished after a stop request or at a sync point; or how the workers ended.

    Raises:
        PoolError: The autoscaler can never bring enough nodes with these slots.
        MoeDiscoError: An error that another attempt cannot repair.
    """
    outcome = _run_trainer(job, context)
    if isinstance(outcome, End) and outcome.costly:
        context.mailbox.count_loss()
    return outcome


def _run_trainer(job: TrainJob, context: AttemptContext) -> TrainResult | End:
    placement, mailbox = context.placement, context.mailbox
    dead_before = dead_nodes()
    attempt_id = mailbox.begin_attempt(job.name)
    trainer = TorchTrainer(
        # Bind the arguments here: the controller would unpickle a `train_loop_config`, and import all of `training` to do so.
        functools.partial(_worker, job, context.stop_files, mailbox.handle, attempt_id),
        scaling_config=ScalingConfig(
            num_workers=placement.workers, use_gpu=placement.pool.gpu > 0, resources_per_worker=placement.bundle),
        run_config=RunConfig(
            # A unique name, because Ray Train would restore the state of an earlier run with the same name.
            name=f"{context.run}-{job.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(context.directory.absolute()),
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=_MAX_STARTS if context.wait_for_slots else 0),
            callbacks=[SlotReporter(
                stage=job.stage, unit=job.name, pool=placement.pool.key, mailbox=mailbox.handle, attempt=attempt_id)],
        ),
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_SECONDS),
    )
    try:
        failure = _fit(trainer)
        if failure is not None and not isinstance(failure, TrainingFailedError):
            mailbox.kill_attempt(job.name)  # the controller may still run, although it is unreachable
        # The error that a worker returned is the cause; those of the other workers only report that they lost this worker.
        outcome = mailbox.outcome(job.name)
    except NotFiniteError as error:
        return End("not_finite", error.step - 1, str(error))
    except StorageError as error:
        return End("storage", mailbox.status(job.name).current_step, str(error))
    finally:
        mailbox.end_attempt(job.name)
    if outcome is None:
        status = mailbox.status(job.name)
        if isinstance(failure, ControllerError) and isinstance(failure.controller_failure, InsufficientClusterResourcesError):
            pool = placement.pool
            raise PoolError(
                f"pools.{pool.key}.resource", pool.resource,
                f"the Ray cluster never has {placement.workers} of it at once, whatever its autoscaler brings; give a node type of "
                "the cluster file this tag, or name the tag that one has")
        if failure is not None:
            return end_of(failure, status, dead_before)
        return End("failed", status.current_step, "its worker ended without a result; see the Ray logs")
    if not outcome.finished and not outcome.waits_for_sync and not any(stop.requested for stop in context.stop_files):
        return End("preempted", outcome.steps, "its node is about to be taken away", saved=True)
    return outcome


def _fit(trainer: TorchTrainer) -> TrainingFailedError | RayError | None:
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as error:
        return error
    return None


def _worker(job: TrainJob, stop_files: Sequence[StopFile], mailbox: ActorHandle, attempt_id: str) -> None:
    context = ray.train.get_context()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = World(rank=context.get_world_rank(), size=context.get_world_size(), device=str(device))
    emit = attempt_emitter(mailbox, attempt_id)
    if world.rank == 0:
        emit(Event("unit_started", job.stage, job.name, {
            "steps": job.steps, "tokens": job.steps * job.step_tokens, "workers": world.size,
            "node": ray.util.get_node_ip_address(), "node_id": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}))
    preempted = _preemption_check(world)
    with _reporting_exit_step(job.name, mailbox, attempt_id) as begin_step:
        try:
            with _logging(job, world, emit) as logged:
                outcome: TrainResult | MoeDiscoError = train(
                    job, world, logged, lambda: any(stop.requested for stop in stop_files) | preempted(), begin_step,
                    losses_per_hour=loss_rate_reader(mailbox, job.losses_per_hour))
        except MoeDiscoError as error:
            outcome = error  # returned, not raised: the worker itself is healthy
    if world.rank == 0 or isinstance(outcome, MoeDiscoError):
        ray.get(mailbox.set_outcome.remote(job.name, attempt_id, outcome))


@contextlib.contextmanager
def _logging(job: TrainJob, world: World, emit: Emit) -> Iterator[Emit]:
    """Write a worker's progress, warnings and errors to LOGS/NAME.RANK.log, in the run directory, which outlives the node.

    Yields:
        An `Emit` that also logs progress.
    """
    if job.logs is None:
        yield emit
        return
    job.logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(job.logs / f"{job.name}.{world.rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(capture=True)
    log = logging.getLogger(f"moedisco.{job.name}")
    log.setLevel(logging.INFO)

    def logged(event: Event) -> None:
        if event.type == "progress":
            log.info(
                "step %(step)d of %(steps)d, loss %(loss).4f, learning rate %(lr).3g, %(tokens_per_second).0f tokens/s", event.data)
        emit(event)

    try:
        node = f"{ray.util.get_node_ip_address()}, process {os.getpid()}, {world.device}"
        log.info("%s: worker %d of %d on %s", job.name, world.rank, world.size, node)
        yield logged
        log.info("ended")
    except BaseException:
        log.exception("died")
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def _reporting_exit_step(unit: str, mailbox: ActorHandle, attempt_id: str) -> Iterator[Callable[[int], None]]:
    """Report the current step to the driver when the block ends, even after an error: the last progress event may be old.

    Yields:
        A function to call with each step that begins.
    """
    current: int | None = None

    def begin_step(step: int) -> None:
        nonlocal current
        current = step

    try:
        yield begin_step
    finally:
        if current is not None:
            ray.wait([mailbox.set_exit_step.remote(unit, attempt_id, current)], timeout=_LAST_MESSAGE_SECONDS)


def _preemption_check(world: World) -> Callable[[], bool]:
    """A function that returns whether a node of the trainer is about to be taken away.

    Ray Train's check is collective: with several workers, each of them must make it at every call.
    """
    checked_at = 0.0

    def preempted() -> bool:
        nonlocal checked_at
        now = time.monotonic()
        if world.size == 1 and now - checked_at < _NOTICE_SECONDS:
            return False
        checked_at = now
        return ray.train.get_preemption_info() is not None

    return preempted
