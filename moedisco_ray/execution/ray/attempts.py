"""One attempt at a training: a Ray Train run that ends with a result, or with how its workers ended before their time.

Ray Train tries nothing again by itself. What follows an end is `policies.retrying`'s decision, and an attempt that waits to be made
again holds nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    PreemptionError,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from moedisco_ray.backend import Placement
from moedisco_ray.core.errors import MoeDiscoError, NotFiniteError, PoolError, StorageError
from moedisco_ray.core.events import Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray.causes import node_gone, unwrapped
from moedisco_ray.execution.ray.event_mailbox import EventMailbox, UnitStatus, emitter, losses_seen
from moedisco_ray.execution.ray.ray_internals import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from moedisco_ray.execution.ray.train_callbacks import Slots, last_line
from moedisco_ray.execution.ray.worker_log import worker_log
from moedisco_ray.policies.retrying import End, kind_of
from moedisco_ray.training import TrainJob, TrainResult, World, train

_COLLECTIVE_TIMEOUT_S = 300  # a hang would otherwise last torch's 30 minutes
_NOTICE_SECONDS = 1.0
"""Between two looks for a notice; a look is a message to another process."""
_MOST_STARTS = 5
"""In a row, in which Ray Train's controller finds no slots or cannot start its workers, until it says so and is asked again."""
_CUT_OFF = re.compile(r"actor \S+ is unavailable|connection (closed|reset)|gloo|nccl", re.IGNORECASE)
"""What those say who cannot reach a worker any more: its process ended, or its node, which Ray may not know yet."""
_VERDICT_SECONDS = 25.0
"""Ray declares a node dead after five health checks three seconds apart, the first of which may be a while off."""
_WORD_SECONDS = 10.0
"""For a worker's last word to the driver, whose machine may be gone."""


@dataclasses.dataclass(frozen=True)
class AttemptContext:
    """What the attempts of a run share.

    Attributes:
        run: Begins the names of the Ray Train runs.
        placement: Where workers run.
        directory: For Ray Train's own state; all nodes must see it.
        stops: Each ends the attempts once it is there.
        mail: The workers' way to the driver.
        waits: Whether an attempt waits minutes for slots, which an autoscaler hears; else it ends after one.
    """

    run: str
    placement: Placement
    directory: Path
    stops: tuple[StopFile, ...]
    mail: EventMailbox
    waits: bool = True


def attempt(job: TrainJob, around: AttemptContext) -> TrainResult | End:
    """Train until the job is finished, or its workers end.

    Returns:
        A result, unfinished if a stop file asked for it; or the end of the workers.

    Raises:
        PoolError: An autoscaler may bring nodes, but none with these slots, or never as many.
        MoeDiscoError: What another attempt could not mend.
    """
    outcome = _made(job, around)
    if isinstance(outcome, End) and outcome.costly:
        around.mail.lose()
    return outcome


def _made(job: TrainJob, around: AttemptContext) -> TrainResult | End:
    placement, mail = around.placement, around.mail
    gone_before = _gone()
    this = mail.begin(job.name)
    trainer = TorchTrainer(
        # Not as the trainer's `train_loop_config`: the controller would unpack that, and import all of training for it.
        functools.partial(_worker, job, around.stops, mail.handle, this),
        scaling_config=ScalingConfig(
            num_workers=placement.workers, use_gpu=placement.pool.gpu > 0, resources_per_worker=placement.bundle),
        run_config=RunConfig(
            # A name of its own: Ray Train would take up the state of an earlier run of the same name; ours is in the job.
            name=f"{around.run}-{job.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(around.directory.absolute()),
            failure_config=FailureConfig(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=_MOST_STARTS if around.waits else 0),
            callbacks=[Slots(job.stage, job.name, placement.pool.key, mail.handle, this)],
        ),
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
    )
    try:
        failure = _fit(trainer)
        if failure is not None and not isinstance(failure, TrainingFailedError):
            mail.kill(job.name)     # out of reach, its controller may live: the next attempt's must be alone
        # What one of the workers has said goes before what the others died of, minutes later, when it was gone.
        outcome = mail.outcome(job.name)
    except NotFiniteError as error:
        return End("not_finite", error.step - 1, str(error))
    except StorageError as error:
        return End("storage", mail.whereabouts(job.name).under_way, str(error))
    finally:
        mail.end(job.name)
    if outcome is None:
        where = mail.whereabouts(job.name)
        if isinstance(failure, ControllerError) and isinstance(failure.controller_failure, InsufficientClusterResourcesError):
            pool = placement.pool
            raise PoolError(
                f"pools.{pool.key}.resource", pool.resource,
                f"the cluster never has {placement.workers} of it at once, whatever its autoscaler brings; give a node type of the "
                "cluster file this tag, or name the tag that one has")
        if failure is not None:
            return end_of(failure, where, gone_before)
        return End("failed", where.under_way, "its worker ended without a result; see the Ray logs")
    if not outcome.finished and not outcome.waits and not any(stop.requested for stop in around.stops):
        return End("preempted", outcome.steps, "its node is about to be taken away", saved=True)
    return outcome


def _fit(trainer: TorchTrainer) -> TrainingFailedError | RayError | None:
    """Train; returns what Ray says if that fails."""
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as error:
        return error
    return None


def end_of(error: TrainingFailedError | RayError, where: UnitStatus, gone_before: Collection[str] = ()) -> End:
    """What an error says of an attempt's end.

    Args:
        error: Of Ray.
        where: The trainer was last seen.
        gone_before: Nodes that were dead when the attempt began.
    """
    if not isinstance(error, TrainingFailedError):
        return End("died", where.under_way, f"its controller died: {last_line(error)}")
    failures: list[BaseException] = [error]
    if isinstance(error, WorkerGroupError):
        failures = [unwrapped(failure) for failure in error.worker_failures.values()]
    elif isinstance(error, ControllerError):
        failures = [unwrapped(error.controller_failure)]
    words = " ".join(f"{type(failure).__name__}: {failure}" for failure in failures)
    unstarted = any(isinstance(failure, WorkerGroupStartupFailedError) for failure in failures)
    unplaced = any(isinstance(failure, WorkerGroupStartupTimeoutError) for failure in failures)
    lost = (
        isinstance(error, PreemptionError) or any(node_gone(failure) for failure in failures)
        or not _alive(where.nodes, _VERDICT_SECONDS if _CUT_OFF.search(words) else 0.0)
        or unplaced or (unstarted and _another_goes(gone_before)))
    reason = "; ".join(sorted({last_line(failure) for failure in failures}))
    kind = kind_of(words, node_lost=lost)
    # What the rest of a gang says then is only that they lost sight of the one that died.
    died = kind == "failed" and (unstarted or any(isinstance(failure, RayActorError) for failure in failures))
    return End("died" if died else kind, where.under_way, reason, saved=unplaced)


def _alive(nodes: Collection[str], patience: float) -> bool:
    """Whether all of the nodes are part of the cluster, and still are after `patience` seconds."""
    deadline = time.monotonic() + patience
    while set(nodes) <= {entry["NodeID"] for entry in ray.nodes() if entry["Alive"]}:
        if time.monotonic() >= deadline:
            return True
        time.sleep(0.5)
    return False


def _gone() -> set[str]:
    return {entry["NodeID"] for entry in ray.nodes() if not entry["Alive"]}


def _another_goes(before: Collection[str]) -> bool:
    """Whether a node is dead that was not before, or is found to be a moment later."""
    deadline = time.monotonic() + _VERDICT_SECONDS
    while _gone() <= set(before):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True


def _worker(job: TrainJob, stops: Sequence[StopFile], mailbox: ActorHandle, attempt: str) -> None:
    """What runs on each worker of a trainer."""
    context = ray.train.get_context()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = World(rank=context.get_world_rank(), size=context.get_world_size(), device=str(device))
    tell = emitter(mailbox, attempt)
    if world.rank == 0:
        tell(Event("unit_started", job.stage, job.name, {
            "steps": job.steps, "tokens": job.steps * job.step_tokens, "workers": world.size,
            "node": ray.util.get_node_ip_address(), "node_id": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}))
    noticed = _notice(world)
    with _leaving(job.name, mailbox, attempt) as begins:
        try:
            with worker_log(job, world, tell) as emit:
                outcome: TrainResult | MoeDiscoError = train(
                    job, world, emit, lambda: any(stop.requested for stop in stops) | noticed(), begins,
                    losses_seen(mailbox, job.losses_per_hour))
        except MoeDiscoError as error:
            outcome = error  # returned, not raised: it is no end of a worker
    if world.rank == 0 or isinstance(outcome, MoeDiscoError):
        ray.get(mailbox.finish.remote(job.name, attempt, outcome))


@contextlib.contextmanager
def _leaving(unit: str, mailbox: ActorHandle, attempt: str) -> Iterator[Callable[[int], None]]:
    """Tells the driver, however the block ends, which step was under way: what was reported last may be many steps behind.

    Yields:
        Is to be told of each step that begins.
    """
    under_way: int | None = None

    def begins(step: int) -> None:
        nonlocal under_way
        under_way = step

    try:
        yield begins
    finally:
        if under_way is not None:
            ray.wait([mailbox.leave.remote(unit, attempt, under_way)], timeout=_WORD_SECONDS)


def _notice(world: World) -> Callable[[], bool]:
    """Whether a node of the trainer is about to be taken away; all its workers must ask equally often."""
    asked = 0.0

    def noticed() -> bool:
        nonlocal asked
        now = time.monotonic()
        if world.size == 1 and now - asked < _NOTICE_SECONDS:
            return False
        asked = now
        return ray.train.get_preemption_info() is not None

    return noticed
