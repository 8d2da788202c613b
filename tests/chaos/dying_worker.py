"""Kills one worker of a gang, with SIGKILL, in the middle of a load, a step or the final save.

Ray calls `arm` in each process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from moedisco_ray.models.checkpoint import Checkpoint
from moedisco_ray.models.shard_file import ShardFile
from moedisco_ray.training.stepper import ResidentStepper

Moment = Literal["load", "step", "save"]
MOMENTS: dict[Moment, tuple[type, str]] = {
    "load": (Checkpoint, "__getitem__"),
    "step": (ResidentStepper, "__call__"),
    "save": (ShardFile, "put"),
}
"""The method of the product whose calls are counted, for each moment."""
FOLDER, MOMENT, RANK, CALLS, WORKERS = "DYING_FOLDER", "DYING_MOMENT", "DYING_RANK", "DYING_CALLS", "DYING_WORKERS"
"""Environment variables: a folder for the mark that a worker has died, when, which worker, at which call, and the
gang's size."""


def settings(folder: Path, moment: Moment, *, rank: int, calls: int, workers: int) -> dict[str, str]:
    """The environment variables of a plan."""
    return {FOLDER: str(folder), MOMENT: moment, RANK: str(rank), CALLS: str(calls), WORKERS: str(workers)}


def mark(folder: Path) -> Path:
    """The file that a worker makes before it dies."""
    return folder / "died"


def arm() -> None:
    """Count this process's calls of the plan's method, and die in the planned one if no worker has died before."""
    kind, name = MOMENTS[os.environ[MOMENT]]  # type: ignore[index]  # one of the moments, see `settings`
    planned = int(os.environ[CALLS])
    method: Callable[..., Any] = getattr(kind, name)
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        if _is_the_one():
            calls += 1
            if calls == planned:
                _die()
        return method(*arguments, **named)

    setattr(kind, name, counted)


def _is_the_one() -> bool:
    return dist.is_initialized() and (dist.get_world_size(), dist.get_rank()) == (
        int(os.environ[WORKERS]),
        int(os.environ[RANK]),
    )


def _die() -> None:
    try:
        mark(Path(os.environ[FOLDER])).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
