"""Distributed checkpoints: written by any number of workers, read by any other number.

CHECKPOINTS/step-0000100/ holds the shards of weights and optimizer (torch.distributed.checkpoint) and `progress.json`.
It appears under this name when complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict

from moedisco_ray.artifacts import disk_full, read_json, write_json
from moedisco_ray.training.job import World

_NAME = re.compile(r"step-(\d{7,})")
_PROGRESS = "progress.json"


@dataclasses.dataclass
class Progress:
    """Where a training stands, besides weights and optimizer.

    Attributes:
        step: Steps made.
        tokens: Tokens trained on.
        losses: Mean cross-entropy of each step.
        seconds: Wall-clock time so far.
        fractions_NE: Selections per token of each expert in the last global batch, one row per router; see `objective`.
        norms: Of the newest gradients, where `spikes.SpikeGuard` needs them.
        round: The last round whose backbone it took in; 0: none.
        joined: The step at which it did.
    """

    step: int = 0
    tokens: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    fractions_NE: list[list[float]] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    round: int = 0
    joined: int = 0


def save(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, world: World, keep: int,
) -> None:
    """Write a checkpoint and drop the oldest ones. Every worker must call it.

    Args:
        directory: Of this training's checkpoints; all workers must see it.
        model: Its weights are saved.
        optimizer: Its state is saved.
        progress: Equal on all workers.
        world: This process.
        keep: How many checkpoints are left.

    Raises:
        RunDirError: The disk is full.
    """
    target = directory / f"step-{progress.step:07d}"
    draft = directory / f".{target.name}.draft"
    try:
        if world.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        _barrier(world)
        with _alone(world) as no_dist:
            dcp.save(_state(model, optimizer), checkpoint_id=draft, no_dist=no_dist)
        if world.rank == 0:
            write_json(draft / _PROGRESS, dataclasses.asdict(progress))
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
            for old in _complete(directory)[:-keep]:
                shutil.rmtree(old)
        _barrier(world)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise _told(error, directory) from error
    except dcp.CheckpointException as error:
        shutil.rmtree(draft, ignore_errors=True)
        causes = [failure[0] for failure in error.failures.values() if isinstance(failure[0], OSError)]
        if causes:
            raise _told(causes[0], directory) from error
        raise


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, if there is one."""
    return next(iter(reversed(_complete(directory))), None)


def steps(directory: Path) -> list[int]:
    """The steps of the complete checkpoints, ascending."""
    return [step_of(path) for path in _complete(directory)]


def step_of(path: Path) -> int:
    """The steps that were made when a checkpoint was written."""
    return int(path.name.removeprefix("step-"))


def discard_after(directory: Path, step: int) -> None:
    """Drop the checkpoints after a step."""
    for path in _complete(directory):
        if step_of(path) > step:
            shutil.rmtree(path)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> Progress:
    """Put a checkpoint into model and optimizer. Every worker must call it.

    Args:
        path: A complete checkpoint.
        model: Takes its weights, cut as it is now.
        optimizer: Takes its state.
        world: This process.
    """
    state = _state(model, optimizer)
    with _alone(world) as no_dist:
        dcp.load(state, checkpoint_id=path, no_dist=no_dist)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return read_progress(path)


def load_weights(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights into a model that is whole, in a process of its own."""
    state = {"model": get_model_state_dict(model)}
    with _alone(World()) as no_dist:
        dcp.load(state, checkpoint_id=path, no_dist=no_dist)
    set_model_state_dict(model, state["model"])


def read_progress(path: Path) -> Progress:
    """Where the training stood at a checkpoint."""
    return Progress(**read_json(path / _PROGRESS))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def _complete(directory: Path) -> list[Path]:
    found = [path for path in directory.glob("step-*") if _NAME.fullmatch(path.name) and (path / _PROGRESS).is_file()]
    return sorted(found, key=step_of)


def _told(error: OSError, directory: Path) -> Exception:
    return disk_full(directory) if error.errno in (errno.ENOSPC, errno.EDQUOT) else error


@contextlib.contextmanager
def _alone(world: World) -> Iterator[bool]:
    with warnings.catch_warnings():
        # It says that it assumes a single process, which is what it is told.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield world.size == 1


def _barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()
