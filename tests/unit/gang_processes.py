"""Gangs of workers on gloo, as processes of this machine."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training_worker import Fault, Work

from moedisco_ray.policies.parallel import Layout
from moedisco_ray.training import TrainJob, TrainResult, World, train

_WORKER = Path(__file__).with_name("training_worker.py")


def gang(
    size: int, directory: Path, work: Sequence[tuple[TrainJob, int | None]], *, fault: Fault | None = None, timeout: float = 30,
    layout: Layout | None = None, gradients: bool = False,
) -> list[dict[str, Any]]:
    """Results of each rank, by job name; none of them if the fault kills a worker.

    Args:
        size: Number of workers.
        directory: Directory for the workers' files.
        work: Jobs, each with the rank that wants to stop it after step `training_worker.STOP`.
        fault: Something that goes wrong on one rank.
        timeout: Timeout of collective operations (s).
        layout: How the workers share a model.
        gradients: Compute `training_worker.first_gradients` of each job instead of its training.
    """
    name = f"work-{size}-{len(list(directory.glob('work-*')))}"
    file = directory / name
    file.write_bytes(pickle.dumps(Work(size, directory / f"rendezvous-{name}", timeout, tuple(work), fault, layout, gradients)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    worker = subprocess.Popen([sys.executable, _WORKER, file], env=environment, start_new_session=True)
    try:
        code = worker.wait(timeout=400)
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, 9)
            worker.wait()
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(directory.glob(f"{name}.*.log")))
    assert (code != 0) == (fault is not None and fault.seconds is None), logs
    return [] if code else [pickle.loads((directory / f"{name}.{rank}").read_bytes()) for rank in range(size)]


def alone(job: TrainJob) -> TrainResult:
    """The same training by a single worker."""
    return train(job, World(), lambda _event: None, lambda: False)
