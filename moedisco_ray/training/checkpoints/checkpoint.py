"""Distributed checkpoints: written by any number of workers, read by any other number. How they are stored: see `storage`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.locations import Location
from moedisco_ray.training.checkpoints import layout
from moedisco_ray.training.checkpoints.io import ShardReader, ShardWriter
from moedisco_ray.training.checkpoints.manifest import Checksum
from moedisco_ray.training.checkpoints.storage import Storage
from moedisco_ray.training.job import TrainJob, World

T = TypeVar("T")

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
        round: The last round whose backbone it took in; 0: none.
        joined: The step at which it did.
    """

    step: int = 0
    tokens: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    fractions_NE: list[list[float]] = dataclasses.field(default_factory=list)
    round: int = 0
    joined: int = 0

    def copy(self) -> Progress:
        """One that training does not go on changing."""
        return dataclasses.replace(self, losses=list(self.losses), fractions_NE=list(self.fractions_NE))


def steps(location: Location) -> list[int]:
    """The steps of the complete checkpoints, ascending."""
    return Storage(location).steps()


def latest(location: Location) -> int | None:
    """The step of the newest complete checkpoint, if there is one."""
    return max(steps(location), default=None)


def discard_after(location: Location, step: int) -> None:
    """Drop the checkpoints after a step."""
    storage = Storage(location)
    for found in storage.steps():
        if found > step:
            storage.discard(found)


def remove(location: Location) -> None:
    """Drop all checkpoints below a location, complete or not."""
    Storage(location).remove()


def storage_of(job: TrainJob) -> Storage:
    """The checkpoints of a training, to be read and written."""
    return Storage(job.checkpoints, job.key_file)


def read_progress(storage: Storage, step: int) -> Progress:
    """Where the training stood at a complete checkpoint.

    Raises:
        StorageError: The checkpoint is damaged, was changed, or is out of reach.
    """
    return Progress(**json.loads(storage.read(step, _PROGRESS, storage.manifest(step)[_PROGRESS])))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors of weights and optimizer, not copied. Every worker must call it.

    What else an optimizer's groups hold follows from the job, and is not stored.
    """
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments["state"]}


def write(
    storage: Storage, state: dict[str, Any], progress: Progress, keep: int, world: World, group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint and drop the oldest ones. Every worker must call it; what fails on one is raised on all.

    Args:
        storage: Of this training's checkpoints.
        state: As `state_of` makes it; nobody may change it meanwhile.
        progress: Equal on all workers.
        keep: How many checkpoints are left.
        world: This process.
        group: For the workers' agreements; None: all of them.
    """
    def drop_oldest() -> None:
        for step in storage.steps()[:-keep]:
            storage.discard(step)

    record = json.dumps(dataclasses.asdict(progress)).encode()
    writer = ShardWriter(storage, progress.step, {_PROGRESS: record}, drop_oldest)
    _alone_is_fine()
    try:
        with _one_error():
            dcp.save(state, storage_writer=writer, process_group=group, no_dist=world.size == 1)
    except BaseException:
        storage.abandon(progress.step)
        raise


def load(
    storage: Storage, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, world: World,
    group: dist.ProcessGroup | None = None,
) -> Progress:
    """Put a checkpoint into model and optimizer. Every worker must call it; what fails on one is raised on all.

    Args:
        storage: Of this training's checkpoints.
        step: Of a complete one.
        model: Takes its weights, cut as it is now.
        optimizer: Takes its state.
        world: This process.
        group: For the workers' agreements; None: all of them.

    Raises:
        StorageError: It is damaged, was changed, or is out of reach. Model and optimizer are then of no use.
        ValueError: It was signed, and yet has another form: another version of this package wrote it.
    """
    def small_files() -> tuple[dict[str, Checksum], bytes, bytes]:
        files = storage.manifest(step)
        return files, storage.read(step, layout.NAME, files[layout.NAME]), storage.read(step, _PROGRESS, files[_PROGRESS])

    checksums, metadata, progress = agreed(small_files, world, group)
    weights, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": optimizer_state["state"]}
    reader = ShardReader(storage, step, checksums, layout.read_layout(metadata, checksums))
    _alone_is_fine()
    with _one_error():
        dcp.load(state, storage_reader=reader, process_group=group, no_dist=world.size == 1)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict={**optimizer_state, "state": state["optimizer"]})
    return Progress(**json.loads(progress))


def agreed(look: Callable[[], T], world: World, group: dist.ProcessGroup | None = None) -> T:
    """What rank 0 sees, or its error, on every worker; another might look a moment later."""
    seen: list[Any] = [None]
    if world.rank == 0:
        try:
            seen = [look()]
        except (MoeDiscoError, OSError) as error:
            seen = [error]
    if world.size > 1:
        dist.broadcast_object_list(seen, src=0, group=group)
    if isinstance(seen[0], Exception):
        raise seen[0]
    return seen[0]


def _alone_is_fine() -> None:
    # torch warns of assuming a single process, which is what it is told. Not `catch_warnings`: it would undo what other threads
    # and trainings that take turns with this one say of warnings.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@contextlib.contextmanager
def _one_error() -> Iterator[None]:
    """Raises what failed on some workers as what it was."""
    try:
        yield
    except dcp.CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values() if isinstance(failure[0], MoeDiscoError | OSError)]
        if causes:
            raise causes[0] from error
        raise
