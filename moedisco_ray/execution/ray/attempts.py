"""One attempt at a training: a Ray Train run that ends with a result, or with the reason why its workers ended early.

A training with one worker runs on a seat, in Ray Train's local mode; a gang is a Ray Train run with workers of its own.
Ray Train retries nothing here. `policies.retrying` decides what follows, and a training that waits for its next attempt
holds no slot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Sequence
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from moedisco_ray.backend import Placement
from moedisco_ray.core.errors import CardError, NotFiniteError, PoolError, StorageError
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.artifacts import disk_full
from moedisco_ray.core.store.locations import first_line
from moedisco_ray.execution.cards import CHECK_SECONDS
from moedisco_ray.execution.ray.card_check import check_card
from moedisco_ray.execution.ray.causes import (
    FULL,
    dead_nodes,
    end_of,
    failures_of,
    last_line,
    may_be_of_the_card,
    unwrapped,
)
from moedisco_ray.execution.ray.event_mailbox import EventMailbox, relaying_stops
from moedisco_ray.execution.ray.mailbox_actor import UnderWay
from moedisco_ray.execution.ray.nodes_aside import NodesAside
from moedisco_ray.execution.ray.ray_train_internals import InsufficientClusterResourcesError
from moedisco_ray.execution.ray.seats import PlaceAsideError, Seat, Seats
from moedisco_ray.execution.ray.train_callbacks import CardCheck, SlotReporter
from moedisco_ray.execution.ray.train_reports import forget_earlier_run, ray_train_run
from moedisco_ray.execution.ray.train_storage import train_storage
from moedisco_ray.execution.ray.worker import train_on_seat, train_on_worker
from moedisco_ray.policies.retrying import End
from moedisco_ray.policies.setting_aside import Place
from moedisco_ray.training import TrainJob, TrainResult

_COLLECTIVE_SECONDS = 300
"""Timeout of a collective operation, in seconds: torch's default of 30 minutes is too long to wait for a hanging
worker."""


_ELSEWHERE_SECONDS = 60.0
"""Seconds to wait for a slot on another node than the ones that a training has left because they are slow."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttemptContext:
    """Data that all attempts of a run share.

    Attributes:
        run: Prefix for the names of Ray Train runs.
        placement: Pool and number of the workers.
        directory: Directory for the driver's files about these trainings.
        stop_files: The attempts end as soon as one of these files exists.
        mailbox: Carries the workers' events to the driver.
        seats: The run's warm processes that hold one slot each. A training with one worker runs in such a process. None
            if the training is a gang.
        aside: Nodes and cards that the run leaves out.
        begun: The seat on which an earlier driver has begun this training, and the id of the attempt; None if a new
            attempt begins.
        avoided: Ids of nodes on which this training should not run, if others come soon; a gang may.
    """

    run: str
    placement: Placement
    directory: Path
    stop_files: tuple[StopFile, ...]
    mailbox: EventMailbox
    seats: Seats | None = None
    aside: NodesAside = dataclasses.field(default_factory=NodesAside)
    begun: tuple[Seat, str] | None = None
    avoided: Collection[str] = ()


def attempt(job: TrainJob, context: AttemptContext) -> TrainResult | End:
    """Train until the job is finished or its workers end.

    Returns:
        The result of the training if its workers returned one; it is unfinished after a stop request or at a sync
        point. Otherwise, how the workers ended.

    Raises:
        PoolError: The autoscaler can never bring enough nodes with these slots.
        MoeDiscoError: An error that another attempt cannot repair.
    """
    try:
        outcome = _attempt(job, context)
    except CardError as error:
        context.aside.put(error, context.mailbox.push)
        return End("bad_card", None, str(error))
    except PlaceAsideError as error:
        return End("bad_card", None, f"the run leaves {error} out")
    except _NeverBegunError:
        return End("preempted", None, "an earlier driver had not started it", saved=True)
    if isinstance(outcome, TrainResult):
        context.aside.found_working()  # of a gang, whose workers check their GPUs themselves
    if isinstance(outcome, End) and outcome.costly:
        context.mailbox.count_loss()
    return outcome


def _attempt(job: TrainJob, context: AttemptContext) -> TrainResult | End:
    mailbox = context.mailbox
    dead_before = dead_nodes()
    attempt_id = mailbox.begin_attempt(job.name) if context.begun is None else context.begun[1]
    where = Place()
    # Without a shared directory, workers cannot see the driver's stop files, and those of an earlier driver watch its.
    relays = job.store.is_remote or context.begun is not None
    relaying = relaying_stops(mailbox, attempt_id, context.stop_files) if relays else contextlib.nullcontext()
    try:
        with relaying:
            if context.seats is None:
                failures = _fit_gang(job, context, attempt_id)
            else:
                failures, where = _train_on_seat(job, context, attempt_id, context.seats)
        # The error that a worker returned is the cause; those of the other workers only report that they lost this
        # worker.
        outcome = mailbox.outcome(job.name)
    except NotFiniteError as error:
        return End("not_finite", error.step - 1, str(error))
    except StorageError as error:
        return End("storage", mailbox.status(job.name).current_step, str(error))
    finally:
        mailbox.end_attempt(job.name)
    if outcome is None:
        if isinstance(failures, End):
            return failures
        if any(isinstance(failure, InsufficientClusterResourcesError) for failure in failures):
            pool = context.placement.pool
            raise PoolError(
                f"pools.{pool.key}.resource",
                pool.resource,
                f"the Ray cluster never has {context.placement.workers} of it at once, whatever its autoscaler "
                "brings; give a node type of the cluster file this tag, or name the tag that one has",
            )
        end = end_of(failures, mailbox.status(job.name), dead_before)
        return _blamed(end, where, job.name, context) if may_be_of_the_card(failures) else end
    context.aside.training_finished(where)
    if not outcome.finished and not outcome.waits_for_sync and not any(stop.requested for stop in context.stop_files):
        return End("preempted", outcome.steps, "its node is about to be taken away", saved=True)
    return outcome


def _blamed(end: End, where: Place, unit: str, context: AttemptContext) -> End:
    """The end of an attempt; one that puts the card aside on which it happened is not the training's fault."""
    if end.kind not in ("failed", "died") or not where.node_id or any(stop.requested for stop in context.stop_files):
        return end
    aside = context.aside.training_failed(context.placement.pool, where, unit, end, context.mailbox.push)
    return dataclasses.replace(end, kind="bad_card") if aside else end


def _train_on_seat(
    job: TrainJob, context: AttemptContext, attempt_id: str, seats: Seats
) -> tuple[Sequence[BaseException], Place]:
    """Train on a seat; returns the error that ended the training, if one did, and where the seat was.

    Raises:
        CardError: torch cannot use the seat's GPU.
        PlaceAsideError: Ray gave the seat a card that the run leaves out.
    """
    try:
        if context.begun is not None:
            return [], _join(job, context, *context.begun, seats)
        if context.avoided:
            with contextlib.suppress(_NoneElsewhereError):
                return [], _on_seat(job, context, attempt_id, seats, seconds=_ELSEWHERE_SECONDS)
        return [], _on_seat(job, dataclasses.replace(context, avoided=()), attempt_id, seats)
    except RayError as error:
        return [unwrapped(error)], Place()
    except _SeatFailedError as failed:
        cause = unwrapped(failed.error)
        if isinstance(cause, CardError):
            raise cause from None
        return [cause], failed.place


class _NoneElsewhereError(Exception):
    """No slot came in time on a node that the training does not avoid."""


class _NeverBegunError(Exception):
    """An earlier driver took a seat for the training, and ended before it called the function."""


class _SeatFailedError(Exception):
    """The work on a seat failed.

    Attributes:
        error: Ray's error.
        place: Where the seat was.
    """

    def __init__(self, error: RayError, place: Place) -> None:
        super().__init__(str(error))
        self.error, self.place = error, place


def _on_seat(
    job: TrainJob, context: AttemptContext, attempt_id: str, seats: Seats, seconds: float | None = None
) -> Place:
    """Train on a seat; wait for it for some seconds, or as long as it takes. Returns where it was.

    Raises:
        _NoneElsewhereError: The seat did not get a slot in time.
    """
    pool, mailbox = context.placement.pool, context.mailbox
    name = f"{context.run}-{job.name}"
    with seats.taken(pool, context.avoided) as seat:
        mailbox.set_actor(job.name, attempt_id, seat.actor)
        if not seat.wait(seconds):
            raise _NoneElsewhereError
        under_way = UnderWay(attempt_id, seat.name, pool.key, str(job.checkpoints), seat.node_id, slots=pool.slots)
        mailbox.start_work(job.name, job.stage, under_way)
        train = functools.partial(
            train_on_seat,
            job,
            context.stop_files,
            mailbox.handle,
            attempt_id,
            name=name,
            gpu=pool.gpu > 0,
            slots=pool.slots,
        )
        try:
            seat.run(name, train, attempt_id)
        except RayError as error:
            raise _SeatFailedError(error, seat.place) from error
        mailbox.forget_actor(job.name)
        return seat.place


def _join(job: TrainJob, context: AttemptContext, seat: Seat, attempt_id: str, seats: Seats) -> Place:
    """Wait for the end of a training that an earlier driver has begun on a seat; returns where the seat is."""
    with seats.lent(seat):
        if not seat.join(attempt_id):
            raise _NeverBegunError
        seat.locate()
        context.mailbox.forget_actor(job.name)
        return seat.place


def _fit_gang(job: TrainJob, context: AttemptContext, attempt_id: str) -> Sequence[BaseException] | End:
    """Train in a Ray Train run; returns its workers' errors, or an `End` if its controller or storage failed."""
    placement, mailbox = context.placement, context.mailbox
    storage_path, name = ray_train_run(job)
    gpu, field = placement.pool.gpu, f"{placement.pool.path}.gpu"
    try:
        forget_earlier_run(storage_path, name)
        trainer = TorchTrainer(
            # Arguments are bound here: the controller would unpickle a `train_loop_config`, and import all of
            # `training` for that.
            functools.partial(train_on_worker, job, context.stop_files, mailbox.handle, attempt_id),
            scaling_config=ScalingConfig(
                num_workers=placement.workers,
                use_gpu=gpu > 0,
                resources_per_worker=placement.bundle,
                label_selector=dict(context.aside.selector(placement.pool)) or None,
            ),
            run_config=RunConfig(
                name=name,
                **train_storage(storage_path)._asdict(),
                # Ray Train must not restart workers: the driver decides what follows, as for sub-models. Ray Train does
                # not know what failed in earlier runs, and counts a node that dies without a notice as a failure. Its
                # controller polls for notices every 2 s: if workers save and return before it sees the notice, it ends
                # the run as finished.
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
                callbacks=[
                    SlotReporter(
                        stage=job.stage,
                        unit=job.name,
                        pool=placement.pool.key,
                        mailbox=mailbox.handle,
                        attempt=attempt_id,
                        dumps=job.store.dumps,
                        check=CardCheck(field, gpu, ray.put(functools.partial(check_card, field)), CHECK_SECONDS)
                        if gpu
                        else None,
                    )
                ],
            ),
            torch_config=TorchConfig(timeout_s=_COLLECTIVE_SECONDS),
        )
        trainer.fit()
    except TrainingFailedError as error:
        return failures_of(error)
    except RayError as error:
        mailbox.kill_attempt(job.name)  # the unreachable controller may be alive, and would run alongside the next one
        return End("died", mailbox.status(job.name).current_step, f"its controller died: {last_line(error)}")
    except OSError as error:
        if error.errno in FULL:
            raise disk_full(context.directory) from error
        return End(
            "storage", mailbox.status(job.name).current_step, f"{storage_path} does not answer ({first_line(error)})"
        )
    return []
