"""The workers of a gang on gloo, forked from one process: they run jobs one after the other and write the results."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist

from moedisco_ray.core.errors import TrainingError
from moedisco_ray.core.records.events import Event
from moedisco_ray.models.shard_file import ShardFile
from moedisco_ray.policies.parallel import Layout
from moedisco_ray.training import TrainJob, World, consensus, sharded_files, sharding, stepper, train
from moedisco_ray.training.batches import Batches
from moedisco_ray.training.sharded_files import local_part

STOP = 8


@dataclasses.dataclass(frozen=True)
class Counting:
    """Held-out text: each token is one more than the one before it; the last target is none."""

    every: int = 4
    files: tuple[Path, ...] = ()

    def batches(self, batch_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        tokens_BL = torch.arange(1, 19).reshape(2, 9)
        targets_BL = tokens_BL[:, 1:].clone()
        targets_BL[1, -1] = -100
        yield tokens_BL[:, :-1], targets_BL


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong on one rank.

    Attributes:
        rank: The rank.
        places: Where it goes wrong: when weights are loaded, before step 5, or when a file of the trained model is
            written.
        seconds: Pause at each of these places (s), once; None: the worker is killed.
    """

    rank: int
    places: tuple[Literal["load", "step", "save"], ...]
    seconds: float | None = None

    def strike(self) -> None:
        if self.seconds is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            time.sleep(self.seconds)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a gang does.

    Attributes:
        size: Number of workers.
        rendezvous: File by which the workers find each other.
        timeout: Timeout of collective operations (s).
        jobs: Jobs, each with the rank that wants to stop it after step `STOP`.
        fault: Something that goes wrong on one rank.
        layout: How the workers share a model.
        gradients: Whether the workers only compute `first_gradients` of each job.
    """

    size: int
    rendezvous: Path
    timeout: float
    jobs: tuple[tuple[TrainJob, int | None], ...]
    fault: Fault | None
    layout: Layout | None
    gradients: bool = False


def first_gradients(job: TrainJob, world: World) -> dict[str, tuple[torch.Tensor, tuple[int, ...]]]:
    """This worker's part of each gradient of a training's first step, before clipping, and the part's first index."""
    found: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {}
    with mock.patch.object(stepper, "LARGEST_NORM", math.inf):
        model = sharding.trainable(job.model, job.optimizer, world, exchange=job.exchange)
        step = stepper.ResidentStepper(model, job, world)

        def keep(*_: object) -> None:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    part, offset = local_part(parameter.grad)
                    found[name] = part.clone(), offset

        step.optimizer.register_step_pre_hook(keep)
        step(Batches(job, world)(0))
    return found


def before(function: Callable[..., Any], strike: Callable[[], None]) -> Callable[..., Any]:
    """A function that calls `strike` before its first call."""
    calls = itertools.count()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not next(calls):
            strike()
        return function(*args, **kwargs)

    return wrapped


def inject(fault: Fault) -> Callable[[int], None]:
    """Make loading and saving go wrong; returns a function that makes steps go wrong."""
    if "load" in fault.places:
        sharded_files.read_tensors = before(sharded_files.read_tensors, fault.strike)
    if "save" in fault.places:
        ShardFile.put = before(ShardFile.put, fault.strike)  # type: ignore[method-assign]
    return lambda step: fault.strike() if step == 5 and "step" in fault.places else None


def run(rank: int, work: Work, file: Path) -> None:
    if not any(job.optimizer.compile for job, _ in work.jobs):  # torch's compiler uses deprecated functions
        warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{work.rendezvous}",
        rank=rank,
        world_size=work.size,
        timeout=timedelta(seconds=work.timeout),
    )
    usual = consensus.POLL_SECONDS
    on_step = inject(work.fault) if work.fault is not None and work.fault.rank == rank else lambda _step: None
    results: dict[str, object] = {}
    for job, stopper in work.jobs:
        world = World(rank, work.size, layout=work.layout)
        if work.gradients:
            results[job.name] = first_gradients(job, world)
            continue
        try:
            # Who is to stop after a certain step is asked after each; the others are, whenever it is time to.
            consensus.POLL_SECONDS = usual if stopper is None else 0.0
            asked = itertools.count(1)
            events: list[Event] = []
            results[job.name] = train(
                job, world, events.append, lambda s=stopper, asked=asked: next(asked) >= STOP and rank == s, on_step
            )
            results[f"{job.name}-looks"] = [event.data for event in events if event.type == "evaluation"]
        except TrainingError as error:
            results[job.name] = str(error)
    file.with_name(f"{file.name}.{rank}").write_bytes(pickle.dumps(results))
    dist.barrier()


def main(file: Path, environment: dict[str, str]) -> None:
    """Fork the workers of the work in a file from this process, which ends with them."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    work: Work = pickle.loads(file.read_bytes())
    ranks = []
    for rank in range(work.size):
        if not (process := os.fork()):
            with file.with_name(f"{file.name}.{rank}.log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                try:
                    run(rank, work, file)
                    code = 0
                except BaseException:  # noqa: BLE001 - a forked process must not go on as its parent
                    sys.excepthook(*sys.exc_info())
                    code = 1
                sys.stderr.flush()
                os._exit(code)  # gloo's threads can abort an interpreter that ends in the usual way
        ranks.append(process)
    sys.exit(max(int(os.waitpid(process, 0)[1] != 0) for process in ranks))
