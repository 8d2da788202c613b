"""Ray Train around the one training loop: which actors run it, where, how many at once, and what happens when one dies."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

from moedisco_ray.errors import MoeDiscoError, TrainingError
from moedisco_ray.events import Emit, Event
from moedisco_ray.on_ray.relay import Relay, emitter, relay
from moedisco_ray.on_ray.session import slots
from moedisco_ray.on_ray.train_callbacks import Restarts, Slots, last_line
from moedisco_ray.on_ray.worker_log import worker_log
from moedisco_ray.shell import Placement, Trained
from moedisco_ray.stopping import NEVER, StopFile
from moedisco_ray.training import TrainJob, TrainResult, World, train

_COLLECTIVE_TIMEOUT_S = 300  # a hang would otherwise last torch's 30 minutes


def train_all(
    jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit, stop: StopFile = NEVER, run: str = "run",
) -> list[Trained]:
    """Train every job, as many at once as the pool has room for; the rest wait in order.

    Args:
        jobs: In the order in which they should start.
        placement: Where.
        directory: For Ray Train's own state, and the flag that stops the trainers; all nodes must see it.
        emit: Receives the workers' events.
        stop: Asks the trainers to end.
        run: Begins the names of the Ray Train runs.

    Raises:
        MoeDiscoError: The first job's error that is ours, such as a loss that is not finite.
        TrainingError: A worker died more often than allowed.
        RunStopped: Somebody asked the run to end; the trainers have saved a checkpoint and ended.
        KeyboardInterrupt: The same, from the keyboard.
    """
    directory.mkdir(parents=True, exist_ok=True)
    end = StopFile(directory / f"stop-{uuid.uuid4().hex}")
    at_once = max(1, min(len(jobs), slots(placement.pool) // placement.workers))
    with relay(emit) as mail, ThreadPoolExecutor(at_once, thread_name_prefix="trainer") as threads:
        futures = [threads.submit(_fit, run, job, placement, directory, (stop, end), mail) for job in jobs]
        try:
            done, waiting = wait(futures, return_when="FIRST_EXCEPTION")
            failed = [future for future in done if future.exception()]
            if failed:
                _end(end, waiting)
            return [future.result() for future in (failed or futures)]
        except KeyboardInterrupt:
            _end(end, futures)
            wait(futures)
            raise


def _end(end: StopFile, futures: Any) -> None:
    end.request("ended")
    for future in futures:
        future.cancel()


def _fit(run: str, job: TrainJob, placement: Placement, directory: Path, stops: tuple[StopFile, StopFile], mail: Relay) -> Trained:
    stops[0].check()
    trainer = TorchTrainer(
        # Not as the trainer's `train_loop_config`: the controller would unpack that, and import all of training for it.
        functools.partial(_worker, job, stops, mail.handle),
        scaling_config=ScalingConfig(
            num_workers=placement.workers, use_gpu=placement.pool.gpu > 0, resources_per_worker=placement.bundle),
        run_config=RunConfig(
            # A name of its own: Ray Train would take up the state of an earlier run of the same name; ours is in the job.
            name=f"{run}-{job.name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(directory.absolute()),
            failure_config=FailureConfig(max_failures=placement.max_failures),
            callbacks=[
                Restarts(job.stage, job.name, mail.handle), Slots(job.stage, job.name, placement.pool.kind, mail.handle)],
        ),
        torch_config=TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(f"{job.name}: {last_line(error)}") from error
    outcome = mail.outcome(job.name)
    if outcome is None:
        raise TrainingError(f"{job.name}: its worker ended without a result; see the Ray logs")
    if not outcome.finished:
        stops[0].check()
    worker_seconds = mail.worker_seconds(job.name)
    seconds = worker_seconds / placement.workers
    ray.get(mail.handle.push.remote(Event("unit_finished", job.stage, job.name, {
        "steps": outcome.steps, "tokens": outcome.tokens, "loss": outcome.loss, "seconds": round(seconds, 3),
        "restored_step": outcome.restored_step})))
    return Trained(outcome, seconds, worker_seconds)


def _worker(job: TrainJob, stops: Sequence[StopFile], mailbox: ActorHandle) -> None:
    """What runs on each worker of a trainer."""
    context = ray.train.get_context()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    world = World(rank=context.get_world_rank(), size=context.get_world_size(), device=str(device))
    if world.rank == 0:
        emitter(mailbox)(Event("unit_started", job.stage, job.name, {
            "steps": job.steps, "tokens": job.steps * job.step_tokens, "workers": world.size,
            "node": ray.util.get_node_ip_address(), "pid": os.getpid()}))
    try:
        with worker_log(job, world, emitter(mailbox)) as emit:
            outcome: TrainResult | MoeDiscoError = train(job, world, emit, lambda: any(stop.requested for stop in stops))
    except MoeDiscoError as error:
        outcome = error  # returned, not raised: Ray Train would try again what cannot get better
    if world.rank == 0 or isinstance(outcome, MoeDiscoError):
        ray.get(mailbox.finish.remote(job.name, outcome))
