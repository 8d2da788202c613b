"""A driver of trainings on the seats of a run, as a process that can be killed.

    python next_driver.py ADDRESS DIRECTORY

trains what DIRECTORY/jobs.pkl holds, and appends its events to DIRECTORY/events.jsonl.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray
from failing_jobs import make_job
from small_run import small_config

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.execution.ray.backend import RayBackend
from moedisco_ray.execution.ray.session import NO_DASHBOARD
from moedisco_ray.training import TrainJob


def write_jobs(directory: Path, units: int, steps: int, log_every: int = 1) -> list[TrainJob]:
    """Trainings of different seeds, for the drivers of a directory."""
    jobs = [
        dataclasses.replace(
            make_job(directory / f"{unit}", steps),
            name=f"submodel-{unit}",
            seed=unit,
            checkpoint_every=None,
            log_every=log_every,
        )
        for unit in range(units)
    ]
    store_jobs(directory, jobs)
    return jobs


def store_jobs(directory: Path, jobs: Sequence[TrainJob]) -> None:
    """Store the trainings of the drivers of a directory."""
    (directory / "jobs.pkl").write_bytes(pickle.dumps(jobs))


@contextlib.contextmanager
def driver(address: str, directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A driver, until the block ends; its output is added to DIRECTORY/output.log."""
    with (directory / "output.log").open("ab") as output:
        process = subprocess.Popen([sys.executable, __file__, address, str(directory)], stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def events(directory: Path) -> list[Event]:
    """The events of all drivers."""
    return EventLog.read(directory / "events.jsonl")


def losses(directory: Path) -> list[Sequence[float]]:
    """The losses of each training, once a driver has ended."""
    found: list[Sequence[float]] = json.loads((directory / "losses.json").read_text(encoding="utf-8"))
    return found


def main(address: str, directory: Path) -> None:
    """Train, and write the losses."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address=address, runtime_env=dict(NO_DASHBOARD), log_to_driver=False, logging_level=logging.ERROR)
    jobs = pickle.loads((directory / "jobs.pkl").read_bytes())
    log = EventLog(directory / "events.jsonl")
    log(Event("run_started", data={"id": "a-run"}))
    earlier = events(directory)
    with RayBackend(small_config(directory), f"run-{directory.name}", logged=earlier) as backend:
        placement = Placement(LowMemoryPool(max_workers=len(jobs)), 1, 0)
        trained = backend.train_all(jobs, placement, directory / "ray", log)
    (directory / "losses.json").write_text(json.dumps([each.result.losses for each in trained]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
