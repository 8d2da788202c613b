"""Distributed checkpoints: any number of workers writes them, and any other number reads them.

`storage` describes the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.store.locations import Location
from moedisco_ray.training.checkpoints import layout
from moedisco_ray.training.checkpoints.io import CheckpointReader, CheckpointWriter
from moedisco_ray.training.checkpoints.manifest import Checksum, signing_key
from moedisco_ray.training.checkpoints.storage import Storage
from moedisco_ray.training.consensus import from_rank_zero
from moedisco_ray.training.job import TrainJob, World

NOTHING: Mapping[str, Tensor] = types.MappingProxyType({})
_PROGRESS = "progress.json"


@dataclasses.dataclass
class Progress:
    """The state of a training, except for the weights and the optimizer state.

    Attributes:
        step: Steps made.
        tokens: Tokens trained on.
        losses: Mean cross-entropy of each step.
        seconds: Training time so far in seconds.
        fractions_NE: How often each expert was selected in the last global batch, per token, [N routers, E experts].
        sync_point: Number of the last sync point whose backbone was loaded; 0 if there is none.
        synced_step: Step at which that backbone was loaded.
    """

    step: int = 0
    tokens: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    fractions_NE: list[list[float]] = dataclasses.field(default_factory=list)
    sync_point: int = 0
    synced_step: int = 0

    def copy(self) -> Progress:
        """Return a copy that further training does not change."""
        return dataclasses.replace(self, losses=list(self.losses), fractions_NE=list(self.fractions_NE))


def steps(location: Location) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return Storage(location).steps()


def latest(location: Location) -> int | None:
    """Step of the newest complete checkpoint; None if there is no checkpoint."""
    return max(steps(location), default=None)


def discard_after(location: Location, step: int) -> None:
    storage = Storage(location)
    for found in storage.steps():
        if found > step:
            storage.discard(found)


def remove(location: Location) -> None:
    """Delete all checkpoints below a location, complete or not."""
    Storage(location).remove()


def storage_of(job: TrainJob) -> Storage:
    """The checkpoint storage of a training, for reading and writing."""
    return Storage(job.checkpoints, job.key_file)


def share_key(job: TrainJob) -> None:
    """Make and publish the key that signs a training's checkpoints. In a shared run directory, do nothing.

    There, the first worker makes the key when it needs it.

    Raises:
        RunDirError: The key cannot be written.
        StorageError: The run's URI does not respond.
    """
    if job.store.is_remote:
        signing_key(job.key_file)
        job.store.publish(job.key_file)


def read_progress(storage: Storage, step: int) -> Progress:
    """The progress stored in a complete checkpoint.

    Raises:
        StorageError: The checkpoint is damaged, was changed, or cannot be reached.
    """
    return Progress(**json.loads(storage.read(step, _PROGRESS, storage.manifest(step)[_PROGRESS])))


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, sync: Mapping[str, Tensor] = NOTHING
) -> dict[str, Any]:
    """The weights and the optimizer's state, as tensors that are not copied. Every worker must call this function.

    `sync` has the tensors that a member keeps between sync points.

    The settings in the optimizer's parameter groups, such as the learning rate, come from the job and are not stored.
    """
    weights, optimizer_state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": optimizer_state["state"], **({"sync": dict(sync)} if sync else {})}


def write(
    storage: Storage,
    state: dict[str, Any],
    progress: Progress,
    keep: int,
    world: World,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint and delete the oldest ones. Every worker must call it; an error on one is raised on all.

    Args:
        storage: Checkpoint storage of this training.
        state: Tensors from `state_of`; they must not change until this function returns.
        progress: Progress of the training, equal on all workers.
        keep: Number of checkpoints to keep.
        world: Rank and device of this worker, and the number of workers.
        group: Process group for coordination; None: the default group.
    """

    def delete_oldest() -> None:
        for step in storage.steps()[:-keep]:
            storage.discard(step)

    record = json.dumps(dataclasses.asdict(progress)).encode()
    writer = CheckpointWriter(storage, progress.step, {_PROGRESS: record}, delete_oldest)
    ignore_single_process_warning()
    try:
        with _original_error():
            dcp.save(state, storage_writer=writer, process_group=group, no_dist=world.size == 1)
    except BaseException:
        storage.abandon(progress.step)
        raise


def load(
    storage: Storage,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    group: dist.ProcessGroup | None = None,
    sync: Mapping[str, Tensor] = NOTHING,
) -> Progress:
    """Load a checkpoint into model and optimizer. Every worker must call it; an error on one is raised on all.

    Args:
        storage: Checkpoint storage of this training.
        step: Step of a complete checkpoint.
        model: Receives the weights; its sharding may differ from that of the writers.
        optimizer: Receives the optimizer state.
        world: Rank and device of this worker, and the number of workers.
        group: Process group for coordination; None: the default group.
        sync: Receives the tensors that a member keeps between sync points.

    Raises:
        StorageError: The checkpoint is damaged, was changed, or cannot be reached. Model and optimizer are then
            unusable.
        ValueError: The signature is valid but the format is not: another version of this package wrote the checkpoint.
    """

    def read_small_files() -> tuple[dict[str, Checksum], bytes, bytes]:
        files = storage.manifest(step)
        return (
            files,
            storage.read(step, layout.NAME, files[layout.NAME]),
            storage.read(step, _PROGRESS, files[_PROGRESS]),
        )

    checksums, metadata, progress = from_rank_zero(read_small_files, world, group)
    weights, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": optimizer_state["state"], **({"sync": dict(sync)} if sync else {})}
    reader = CheckpointReader(storage, step, checksums, layout.read_layout(metadata, checksums))
    ignore_single_process_warning()
    with _original_error():
        dcp.load(state, storage_reader=reader, process_group=group, no_dist=world.size == 1)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict={**optimizer_state, "state": state["optimizer"]},
    )
    return Progress(**json.loads(progress))


def ignore_single_process_warning() -> None:
    """Ignore torch's warning about checkpoints of a single process."""
    # torch warns that it assumes a single process, although `no_dist` asks for that. `catch_warnings` would not do: at
    # its end it also undoes changes that other threads, or interleaved trainings, made to the warning filters.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


@contextlib.contextmanager
def _original_error() -> Iterator[None]:
    """Raise a worker's original error instead of torch's `CheckpointException`, which wraps those of all workers."""
    try:
        yield
    except dcp.CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values() if isinstance(failure[0], MoeDiscoError | OSError)]
        if causes:
            raise causes[0] from error
        raise
