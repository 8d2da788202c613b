"""The training function of each worker: in a seat for one worker, and in each process of a gang."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import ray_internals
from moedisco_ray.execution.ray.card_memory import fitted_to_card
from moedisco_ray.execution.ray.pulse import Pulse
from moedisco_ray.execution.ray.syncs import MailboxBoard
from moedisco_ray.execution.ray.train_reports import TrainReports
from moedisco_ray.execution.ray.worker_mailbox import attempt_emitter, loss_rate_reader, stop_reader
from moedisco_ray.training import TrainJob, TrainResult, World, devices_of, train

_NOTICE_SECONDS = 1.0
"""Minimum interval between two checks for a preemption notice, in seconds: each check is a message to another
process."""
_LAST_MESSAGE_SECONDS = 10.0
"""Timeout of a worker's last message to the driver, in seconds: the driver's machine may be gone."""
_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def train_on_seat(
    job: TrainJob,
    stop_files: Sequence[StopFile],
    mailbox: ActorHandle,
    attempt_id: str,
    name: str,
    *,
    gpu: bool,
    slots: int,
) -> None:
    """Train in this process, as the only worker of a Ray Train run in local mode.

    Args:
        job: The training.
        stop_files: The training ends with a checkpoint once one of these files exists. For a run at a URI, and for one
            that has got another driver, the stop request comes through the mailbox instead.
        mailbox: The run's mailbox actor; it receives events and the outcome, and passes on stop requests.
        attempt_id: Id of the attempt in the mailbox.
        name: Name of the Ray Train run.
        gpu: Whether the seat's pool has GPUs; the seat's has been checked then.
        slots: Number of slots that the seat holds, on which the training computes.
    """
    TorchTrainer(
        functools.partial(train_on_worker, job, stop_files, mailbox, attempt_id, in_gang=False, slots=slots),
        scaling_config=ScalingConfig(num_workers=0, use_gpu=gpu),
        run_config=RunConfig(name=name),
    ).fit()


def train_on_worker(
    job: TrainJob,
    stop_files: Sequence[StopFile],
    mailbox: ActorHandle,
    attempt_id: str,
    *,
    in_gang: bool = True,
    slots: int = 1,
) -> None:
    """The training function of each worker: call `training.train`, and send its result or its error to the mailbox.

    The workers of a gang also report to Ray Train. For a training on a seat, Ray Train would not use the reports.
    """
    context = ray.train.get_context()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    devices = devices_of(str(device), slots)
    world = World(rank=context.get_world_rank(), size=context.get_world_size(), device=str(device), devices=devices)
    if job.sharing is not None and world.size > 1:
        world = dataclasses.replace(world, layout=job.sharing.layout(world.size, _workers_per_node(device)))
    reports = TrainReports(job, world)
    emit = reports.noting(attempt_emitter(mailbox, attempt_id))
    card_gb: float | None = None
    if device.type == "cuda":
        job, card_gb = fitted_to_card(job, world, emit)
    if world.rank == 0:
        emit(
            Event(
                "unit_started",
                job.stage,
                job.name,
                {
                    "steps": job.steps,
                    "tokens": job.steps * job.step_tokens,
                    "workers": world.size * slots,
                    "node": ray.util.get_node_ip_address(),
                    "node_id": ray.get_runtime_context().get_node_id(),
                    "pid": os.getpid(),
                    **({} if card_gb is None else {"card_gb": card_gb}),
                },
            )
        )
    preempted = _preemption_check(world)
    asked_by_mailbox = stop_reader(mailbox, attempt_id)

    def should_stop() -> bool:
        if in_gang:
            reports.send_if_due()
        return asked_by_mailbox() | any(stop.requested for stop in stop_files) | preempted()

    with _reporting_steps(job, world, mailbox, attempt_id) as on_step:
        try:
            with _logging(job, world, emit) as logged:
                outcome: TrainResult | MoeDiscoError = train(
                    job,
                    world,
                    logged,
                    should_stop,
                    on_step,
                    losses_per_hour=loss_rate_reader(mailbox, job.losses_per_hour),
                    board=MailboxBoard.of_member(mailbox),
                )
            if in_gang:
                reports.send()
        except MoeDiscoError as error:
            outcome = error  # returned, not raised: the worker itself is healthy
    if world.rank == 0 or isinstance(outcome, MoeDiscoError):
        ray.get(mailbox.set_outcome.remote(job.name, attempt_id, job.store.dumps(outcome)))


def _log_file(logs: Path, job: TrainJob, world: World) -> Path:
    return logs / f"{job.name}.{world.rank}.log"


def _log_stacks(job: TrainJob, world: World) -> None:
    """Add what all threads of this process do to its log."""
    if job.logs is None:
        return
    path = _log_file(job.logs, job, world)
    with path.open("a", encoding="utf-8") as file:
        file.write("a step hangs; the stacks of the threads:\n")
        file.flush()  # what follows is written to the file's descriptor
        faulthandler.dump_traceback(file, all_threads=True)
    with contextlib.suppress(MoeDiscoError):
        for store in (job.store, job.owner_store):
            store.publish(path)


def _workers_per_node(device: torch.device) -> int:
    """Number of workers on each node, between which links are fast; 1 without GPUs or if the numbers differ."""
    if device.type == "cpu":
        return 1
    own = ray.train.get_context().get_local_world_size()
    fewest_most = torch.tensor([-own, own], device=device)
    dist.all_reduce(fewest_most, op=dist.ReduceOp.MAX)
    fewest, most = -int(fewest_most[0]), int(fewest_most[1])
    return most if fewest == most else 1


@contextlib.contextmanager
def _logging(job: TrainJob, world: World, emit: Emit) -> Iterator[Emit]:
    """Write a worker's progress, warnings and errors to LOGS/NAME.RANK.log in the run directory.

    The file outlives the node.

    Yields:
        An `Emit` that also logs progress.
    """
    if job.logs is None:
        yield emit
        return
    job.logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(_log_file(job.logs, job, world), encoding="utf-8")
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(capture=True)
    log = logging.getLogger(f"moedisco.{job.name}")
    log.setLevel(logging.INFO)

    def logged(event: Event) -> None:
        if event.type == "progress":
            log.info(
                "step %(step)d of %(steps)d, loss %(loss).4f, learning rate %(lr).3g, %(tokens_per_second).0f tokens/s",
                event.data,
            )
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
        with contextlib.suppress(MoeDiscoError):  # a log that cannot be stored must not fail the training
            for store in (job.store, job.owner_store):
                store.publish(_log_file(job.logs, job, world))


@contextlib.contextmanager
def _reporting_steps(
    job: TrainJob, world: World, mailbox: ActorHandle, attempt_id: str
) -> Iterator[Callable[[int | None], None]]:
    """Report to the driver that the training advances, and at which step it ends.

    Yields:
        A function to call with each step that begins, and with None when it has ended.
    """
    pulse = Pulse(
        functools.partial(mailbox.beat.remote, job.name, attempt_id),
        compiles=bool(job.optimizer.compile),
        in_gang=world.size > 1,
        dump=functools.partial(_log_stacks, job, world),
    )
    with (
        pulse if world.rank == 0 else contextlib.nullcontext(),
        reporting_exit_step(job.name, mailbox, attempt_id) as begin_step,
    ):

        def on_step(step: int | None) -> None:
            pulse.step(step)
            if step is not None:
                begin_step(step)

        yield on_step


@contextlib.contextmanager
def reporting_exit_step(unit: str, mailbox: ActorHandle, attempt_id: str) -> Iterator[Callable[[int], None]]:
    """Report the current step to the driver when the block ends, even after an error.

    The last progress event may be old.

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
    """A function that returns whether a node of the training is about to be taken away.

    Ray Train's check is collective: each worker of a gang must make it at every call. In a seat Ray Train has no
    controller to ask.
    """
    if world.size > 1:
        return lambda: ray.train.get_preemption_info() is not None
    node = ray.get_runtime_context().get_node_id()
    checked_at = 0.0

    def preempted() -> bool:
        nonlocal checked_at
        now = time.monotonic()
        if now - checked_at < _NOTICE_SECONDS:
            return False
        checked_at = now
        return node in ray_internals.draining_nodes()

    return preempted
