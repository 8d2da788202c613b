"""Gangs of workers on gloo, as processes of this machine."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

import training_worker
from training_worker import Fault, Work

from moedisco_ray.policies.parallel import Layout
from moedisco_ray.training import TrainJob, TrainResult, World, train

_SECONDS = 400.0
"""Maximum time of a gang."""


@functools.cache
def processes() -> ForkServerContext:
    """Processes that begin with torch imported, which takes longer than most gangs train."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moedisco_ray.training"])
    return context


def gang(
    size: int,
    directory: Path,
    work: Sequence[tuple[TrainJob, int | None]],
    *,
    fault: Fault | None = None,
    timeout: float = 30,
    layout: Layout | None = None,
    gradients: bool = False,
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
    file.write_bytes(
        pickle.dumps(Work(size, directory / f"rendezvous-{name}", timeout, tuple(work), fault, layout, gradients))
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    worker = processes().Process(target=training_worker.main, args=(file, environment))
    with mock.patch.dict(os.environ, environment):  # what is imported before `main` reads it too
        worker.start()
    try:
        worker.join(_SECONDS)
        assert worker.exitcode is not None, f"the gang takes more than {_SECONDS:g} s"
    finally:
        if worker.is_alive():
            os.killpg(worker.ident or 0, signal.SIGKILL)
            worker.join()
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(directory.glob(f"{name}.*.log")))
    assert (worker.exitcode != 0) == (fault is not None and fault.seconds is None), logs
    return (
        [] if worker.exitcode else [pickle.loads((directory / f"{name}.{rank}").read_bytes()) for rank in range(size)]
    )


def alone(job: TrainJob) -> TrainResult:
    """The same training by a single worker."""
    return train(job, World(), lambda _event: None, lambda: False)
