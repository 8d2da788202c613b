"""What it costs to train many small sub-models on a few slots, in three forms of one-worker training on Ray:

seats          the product: one long-lived actor per slot, which runs Ray Train in local mode, one sub-model after the
               other
trainer        a new Ray Train run with one worker for each sub-model
long-trainer   one Ray Train run with one worker per slot, which trains a fixed list of sub-models, one after the other

All three run the same training function. Targets: the next sub-model's first step less than 1 s after the end of the
one before it; at most 20 MB on the head node for each sub-model that trains. It is a slope: each arm runs once more
with three times the slots and sub-models, and the additional memory of Ray's own processes and the driver is divided by
the additional slots. `--jobs 256 --slots 64 --steps 100 --pace 2 --rounds 1 --arms seats --no-slope --result seats_256`
asks whether one machine holds 64 at once, and what the queue adds: the seconds in which a slot has no sub-model
although some wait.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import os
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks.harness import environment, interleave, spreads, write_result
from benchmarks.pace import Pace
from moedisco_ray.backend import Placement
from moedisco_ray.core.config import Architecture, LowMemoryPool, Optimizer
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import NEVER
from moedisco_ray.execution.ray.attempts import AttemptContext, attempt
from moedisco_ray.execution.ray.backend import train_all
from moedisco_ray.execution.ray.event_mailbox import EventMailbox, open_mailbox
from moedisco_ray.execution.ray.session import NO_DASHBOARD
from moedisco_ray.execution.ray.worker import train_on_worker
from moedisco_ray.models import hf_config, random_weights, write_checkpoint
from moedisco_ray.packed_tokens import write_packed
from moedisco_ray.training import TrainJob

SIZES = Architecture(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    moe_intermediate_size=24,
    num_experts=1,
    num_experts_per_tok=1,
)
VOCABULARY, LENGTH, BATCH = 64, 16, 4
ARMS = ("seats", "trainer", "long-trainer")
WORKERS = ("ray::Seat", "ray::seats-", "ray::RayTrainWorker")
"""Processes that hold a slot; on a real cluster they are on other machines than the head."""


def make_jobs(directory: Path, count: int, steps: int, pace: float) -> list[TrainJob]:
    """Equal tiny sub-models on the same random tokens, with a wait of `pace` seconds after each step."""
    config = hf_config("qwen3_moe", SIZES, VOCABULARY, LENGTH, 0).to_dict()
    write_checkpoint(directory / "model", random_weights(config, 0).items(), config)
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, 2 * steps * BATCH * LENGTH)
    write_packed(directory / "tokens", [[tokens]], 0, VOCABULARY)
    return [
        TrainJob(
            stage="submodels",
            name=f"submodel-{i}",
            model=directory / "model",
            packed_dirs=(directory / "tokens",),
            output=directory / str(i) / "trained",
            checkpoints=directory / str(i) / "steps",
            steps=steps,
            sequence_length=LENGTH,
            optimizer=Optimizer(lr=1e-3, batch_tokens=BATCH * LENGTH),
            checkpoint_every=10 * steps,
            log_every=1,
            held_out=Pace(pace) if pace else None,
        )
        for i in range(count)
    ]


def train_long(jobs: Sequence[TrainJob], slots: int, directory: Path, mailbox: EventMailbox) -> None:
    """Train every `slots`-th job in one Ray Train run."""
    attempts = {job.name: mailbox.begin_attempt(job.name) for job in jobs}

    def fit(first: int) -> None:
        TorchTrainer(
            functools.partial(_train_list, jobs[first::slots], mailbox.handle, attempts),
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"low_mem_gpu": 1}),
            run_config=RunConfig(name=f"long-{first}", storage_path=str(directory)),
        ).fit()

    with ThreadPoolExecutor(slots) as threads:
        list(threads.map(fit, range(slots)))


def _train_list(jobs: Sequence[TrainJob], mailbox: Any, attempts: dict[str, str]) -> None:
    for job in jobs:
        train_on_worker(job, (), mailbox, attempts[job.name])


def run(arm: str, jobs: Sequence[TrainJob], slots: int, directory: Path) -> list[Event]:
    """Train all jobs; returns the events."""
    events: list[Event] = []
    placement = Placement(LowMemoryPool(max_workers=slots), 1, 0)
    if arm == "seats":
        train_all(jobs, placement, directory, events.append, run="seats")
        return events
    with open_mailbox(events.append) as mailbox:
        if arm == "long-trainer":
            train_long(jobs, slots, directory, mailbox)
            return events
        context = AttemptContext(
            run="trainer", placement=placement, directory=directory, stop_files=(NEVER,), mailbox=mailbox, seats=None
        )
        with ThreadPoolExecutor(slots) as threads:
            list(threads.map(lambda job: attempt(job, context), jobs))
    return events


def gaps(events: Sequence[Event], slots: int) -> list[float]:
    """Seconds from a sub-model's last step to the next one's first, in the order in which slots became free.

    A sub-model that ends frees a slot, and the next one that has not begun takes it; so the i-th end is followed by the
    first step of the (i + slots)-th sub-model.
    """
    steps: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.type == "progress" and event.unit is not None:
            steps[event.unit].append(event.time)
    begins = sorted(times[0] for times in steps.values())
    ends = sorted(times[-1] for times in steps.values())
    return [begin - end for begin, end in zip(begins[slots:], ends, strict=False)]


@contextlib.contextmanager
def watching_memory(samples: list[tuple[int, float]], interval: float = 0.5) -> Iterator[None]:
    """Record regularly how many workers exist, and the memory of this Ray session's other processes (MB)."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(interval):
            samples.append(memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def memory() -> tuple[int, float]:
    """Number of workers, and proportional set size of Ray's other processes and of this one (MB)."""
    workers, held = 0, 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if process.name().startswith(WORKERS):
                workers += 1
            else:
                held += process.memory_full_info().pss / 2**20
    return workers, held


def measure(arm: str, count: int, slots: int, steps: int, pace: float) -> dict[str, float]:
    """One arm: seconds between sub-models, memory on the head while all slots train (MB), and seconds of the whole."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=slots,
        resources={"low_mem_gpu": slots},
        include_dashboard=False,
        runtime_env=dict(NO_DASHBOARD),
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=300_000_000,
        _system_config={
            "prestart_worker_first_driver": False,  # idle processes, which are on other machines of a cluster
            "memory_monitor_refresh_ms": 0,
        },
    )  # it would kill workers, whose memory is that of other machines too
    samples: list[tuple[int, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        jobs = make_jobs(Path(scratch), count, steps, pace)
        began = time.time()
        with watching_memory(samples):
            events = run(arm, jobs, slots, Path(scratch) / "ray")
        seconds = time.time() - began
    ray.shutdown()
    between = [gap - pace for gap in gaps(events, slots)]  # the last step's wait is part of its training
    full = [held for workers, held in samples if workers >= slots] or [max(held for _, held in samples)]
    first = min(event.time for event in events if event.type == "progress")
    training = sum(steps_seconds(events).values()) + count * pace
    return {
        "first_step": first - began,
        "next_step": statistics.median(between),
        "slowest_next_step": max(between),
        "head_mb": statistics.median(full),
        "head_peak_mb": max(held for _, held in samples),
        "seconds": seconds,
        "idle_share": sum(between) / (sum(between) + training),
    }


def steps_seconds(events: Sequence[Event]) -> dict[str, float]:
    """Seconds from the first to the last step of each sub-model."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.type == "progress" and event.unit is not None:
            times[event.unit].append(event.time)
    return {unit: each[-1] - each[0] for unit, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pace", type=float, default=0.0, help="wait after each step (s), as for a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--slope", action=argparse.BooleanOptionalAction, default=True, help="measure the memory of one more slot"
    )
    parser.add_argument("--result", default="seats", help="name of the result file")
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, arguments.jobs, arguments.slots, arguments.steps, arguments.pace)))
        return
    arms, jobs, slots = arguments.arms.split(","), arguments.jobs, arguments.slots
    sizes = ("--jobs", str(jobs), "--slots", str(slots), "--steps", str(arguments.steps), "--pace", str(arguments.pace))
    rounds = interleave(__spec__.name, arms, arguments.rounds, *sizes)
    result: dict[str, Any] = {
        **environment(shlex.join(["python", "-m", "benchmarks.seats", *sys.argv[1:]])),
        "setting": {
            "jobs": jobs,
            "slots": slots,
            "steps": arguments.steps,
            "pace": arguments.pace,
            "rounds": arguments.rounds,
        },
        "targets": {"next_step": 1.0, "head_mb_per_slot": 20, "head_mb": 4000, "idle_share": 0.05},
        "arms": {arm: spreads(results, results[0]) for arm, results in rounds.items()},
    }
    if arguments.slope:
        more = interleave(__spec__.name, arms, 1, "--jobs", str(3 * jobs), "--slots", str(3 * slots), *sizes[4:])
        result["head_mb_per_slot"] = {
            arm: (more[arm][0]["head_mb"] - result["arms"][arm]["head_mb"]["median"]) / (2 * slots) for arm in arms
        }
    write_result(arguments.result, result)


if __name__ == "__main__":
    main()
