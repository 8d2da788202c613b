"""The one training loop: for the seed model, the sub-models and the merged Mixture-of-Experts.

The global batch of a step depends on (seed, step) alone, and every loss is a sum over its tokens. So the result is the
same for any number of workers and any micro-batch size, up to rounding. When a run is interrupted and resumed, it is
bit-identical on CPUs of one kind, and with `deterministic` on GPUs of one kind; on GPUs without it, up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

import torch.distributed as dist

from moedisco_ray.core.records.events import Emit
from moedisco_ray.models import reused_memory
from moedisco_ray.training.arithmetic import arithmetic_of
from moedisco_ray.training.batches import Batches
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.checkpoints.saver import Saver
from moedisco_ray.training.consensus import Consensus
from moedisco_ray.training.conversations import with_conversations_apart
from moedisco_ray.training.job import TrainJob, TrainResult, World
from moedisco_ray.training.lora import saved_part
from moedisco_ray.training.metrics import HeldOutLoss, TrainingMetrics
from moedisco_ray.training.objective import expert_balance
from moedisco_ray.training.optimizer import learning_rate, set_learning_rate
from moedisco_ray.training.optimizer_state import load_optimizer_state
from moedisco_ray.training.results import drop_checkpoints, finished_result, write_model
from moedisco_ray.training.sharded_files import cpu_group
from moedisco_ray.training.sharding import check_arithmetic, trainable
from moedisco_ray.training.stepper import ResidentStepper
from moedisco_ray.training.streamed_stepper import StreamedStepper
from moedisco_ray.training.sync.coordinator import MemberBoard
from moedisco_ray.training.sync.member import SyncMember, coded_weights, discard_ahead


def _ignore_step(step: int | None) -> None:
    del step


def train(
    job: TrainJob,
    world: World,
    emit: Emit,
    stop: Callable[[], bool],
    on_step: Callable[[int | None], None] = _ignore_step,
    losses_per_hour: Callable[[], float] | None = None,
    board: MemberBoard | None = None,
) -> TrainResult:
    """Run `train_in_turns` to its end, sleeping while it waits."""
    steps = train_in_turns(job, world, emit, stop, on_step=on_step, losses_per_hour=losses_per_hour, board=board)
    with arithmetic_of(job, world):
        while True:
            try:
                pause = next(steps)
            except StopIteration as end:
                result: TrainResult = end.value
                return result
            on_step(None)  # it waits for others, and does not hang
            time.sleep(pause)


def train_in_turns(
    job: TrainJob,
    world: World,
    emit: Emit,
    stop: Callable[[], bool],
    on_step: Callable[[int | None], None] = _ignore_step,
    losses_per_hour: Callable[[], float] | None = None,
    board: MemberBoard | None = None,
) -> Generator[float, None, TrainResult]:
    """Train from the newest checkpoint, if one exists, and write the model; yield while waiting at a sync point.

    If the training is finished and its checkpoints are deleted, return the recorded result. Every worker of a training
    must call this function. Trainings in one process take turns where they yield, inside `arithmetic_of`.

    Args:
        job: The training.
        world: Rank and device of this worker, and the number of workers.
        emit: Receives `progress` and `evaluation` events, on rank 0.
        stop: Polled after steps. Once it is true on any worker, all save a checkpoint and return an unfinished result.
        on_step: Called before each step with its number, counted from 0, and after it with None.
        losses_per_hour: Function that returns the current estimate of worker losses per worker-hour. By default it is
            the job's estimate.
        board: Board on which the members of sync points agree; None without sync points.

    Yields:
        Seconds to wait, each time it waits for the other members at a sync point; never without sync points.

    Raises:
        NotFiniteError: A loss or a gradient is not finite.
        ConfigError: The training computes in bf16, and the GPU has none.
        CheckpointError: The initial optimizer state is missing, or belongs to another model.
        CorpusError: The packed tokens are shorter than one sequence.
        RunDirError: The disk is full.
        StorageError: The checkpoint storage does not respond, or the newest checkpoint is damaged.
    """
    recorded = finished_result(job)
    if recorded is not None:
        return recorded
    check_arithmetic(job.optimizer, world.device)
    # The group comes first: connecting it is the last operation in which workers must arrive together until all files
    # are read.
    with cpu_group(world) as group, job.using_files(), reused_memory(world.device):
        discard_ahead(job)
        result = yield from _train_in_turns(
            with_conversations_apart(job),
            world,
            emit,
            stop,
            on_step=on_step,
            losses_per_hour=losses_per_hour,
            group=group,
            board=board,
        )
    if result.finished and job.drop_checkpoints and world.rank == 0:
        drop_checkpoints(job, result)
    return result


def _train_in_turns(
    job: TrainJob,
    world: World,
    emit: Emit,
    stop: Callable[[], bool],
    *,
    on_step: Callable[[int | None], None],
    losses_per_hour: Callable[[], float] | None,
    group: dist.ProcessGroup | None,
    board: MemberBoard | None,
) -> Generator[float, None, TrainResult]:
    model = trainable(
        job.model, job.optimizer, world, group, job.exchange, lora=job.lora, seed=job.seed, memory=job.memory
    )
    stepper = (StreamedStepper if job.memory == "streamed" else ResidentStepper)(model, job, world)
    coded = coded_weights(job, model)
    kept = {} if coded is None else coded.saved
    with (
        Saver(
            job, saved_part(model), stepper.optimizer, world, emit=emit, losses_per_hour=losses_per_hour, sync=kept
        ) as saver,
        Batches(job, world) as batches,
    ):
        stepper.select(max(0, saver.newest - 1))  # a checkpoint has the optimizer state of the block that trained last
        progress = saver.restore()
        if job.optimizer_state is not None and not saver.newest:
            load_optimizer_state(job.optimizer_state, model, stepper.optimizer, world, group)
        stepper.restore(progress.fractions_NE)
        restored = progress.step
        metrics = TrainingMetrics(job, world, emit, progress)
        evaluate = HeldOutLoss(job, stepper, world, metrics, emit)
        sync = SyncMember(job, model, metrics, world, board, coded=coded)
        agree = Consensus((stop, saver.is_due), world)

        def progress_now() -> Progress:
            progress.fractions_NE = stepper.fractions_NE.tolist()
            return progress

        stopped = waits_for_sync = False
        # the last turn makes no step: a sync point may be due after the last one
        for step in range(restored, job.steps + 1):
            waits_for_sync = not (yield from sync.sync_before(step, stop, lambda: saver.save_and_wait(progress_now())))
            if waits_for_sync or sync.is_over or step == job.steps:
                break
            on_step(step)
            stepper.select(step)
            lr = learning_rate(step, job.steps, job.optimizer, job.span)
            set_learning_rate(stepper.optimizer, lr)
            metrics.add(*stepper(batches(step)))
            done = step + 1
            log = done % job.log_every == 0
            if log:
                metrics.update()
            on_step(None)
            last = done == job.steps
            stopped, save_is_due = (False, False) if last else agree()
            if last or stopped or save_is_due or saver.is_scheduled(done):
                metrics.update()
                saver.save(progress_now())
            if log or last or stopped:
                metrics.log(lr, expert_balance(stepper.fractions_NE))
            evaluate(done)
            if stopped:
                break
        stopped = stopped or waits_for_sync
        if not stopped:
            evaluate(progress.step, ended=True)
            write_model(model, stepper.optimizer, job, world, group)
    return TrainResult(
        progress.step,
        progress.tokens,
        tuple(progress.losses),
        progress.seconds,
        restored_step=restored,
        finished=not stopped,
        waits_for_sync=waits_for_sync,
    )
