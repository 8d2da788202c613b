"""Asynchronous checkpoints: training stops only while weights and optimizer state are copied to CPU memory.

Streamed training has both in CPU memory, and changes them there. A copy would need as much memory again, so it stops
until the checkpoint is safe, which for a checkpoint at a URI is when the upload has ended.

A thread writes the copy. The next save waits for the previous one, and so does the end of the `with` block: if the
block ends without an error, the last checkpoint is safe. An error in the thread is raised in the training's thread, at
the next save at the latest.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.policies.checkpointing import USUAL, SaveCost, interval
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.consensus import from_rank_zero
from moedisco_ray.training.job import TrainJob, World

_TIMEOUT = timedelta(hours=1)
"""Maximum wait for the other workers' uploads. It may be long, because it is not needed to detect dead workers."""


@dataclasses.dataclass(frozen=True)
class _Upload:
    """A checkpoint that is being written.

    Attributes:
        step: Step of the checkpoint.
        started: Time at which training paused for the copy, in seconds on a monotonic clock.
        stall: Duration of that pause in seconds.
        written: Future that returns the time at which the upload was complete, on the same clock.
    """

    step: int
    started: float
    stall: float
    written: Future[float]


class Saver:
    """Saves and restores the checkpoints of one training. Every worker must call the same methods in the same order.

    Args:
        job: The training.
        model: Model to save and restore.
        optimizer: Optimizer to save and restore.
        world: Rank and device of this worker, and the number of workers.
        emit: Receives a `checkpoint` event for each checkpoint, on rank 0.
        losses_per_hour: Function that returns the current estimate of worker losses per worker-hour. By default it is
            the job's estimate.
        sync: Tensors that a member keeps between sync points, to save and restore.

    Raises:
        ConfigError: The checkpoint storage does not exist.
    """

    def __init__(
        self,
        job: TrainJob,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        emit: Emit,
        losses_per_hour: Callable[[], float] | None = None,
        sync: Mapping[str, Tensor] = checkpoint.NOTHING,
    ) -> None:
        self._job = job
        self._model = model
        self._optimizer = optimizer
        self._world = world
        self._emit = emit
        self._losses_per_hour = losses_per_hour or (lambda: job.losses_per_hour)
        self._sync = sync
        self._storage = checkpoint.storage_of(job)
        # Uploads use their own process group: the collectives of training must not wait for those of an upload.
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if world.size > 1 else None
        on_gpu = torch.device(world.device).type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
            )
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: _Upload | None = None
        self._saved = 0
        self._cost: SaveCost | None = None
        self._saved_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last save, unless the block failed.

        Raises:
            MoeDiscoError: The last save failed.
        """
        try:
            if error is None:
                self._finish_upload()
        finally:
            self._thread.shutdown()
            self._stager.close()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    @functools.cached_property
    def newest(self) -> int:
        """Step of the newest checkpoint, from which training resumes; 0 if no checkpoint exists.

        Raises:
            StorageError: The storage does not respond.
        """
        return max(from_rank_zero(self._storage.steps, self._world, self._group), default=0)

    def restore(self) -> Progress:
        """Load the newest checkpoint into model and optimizer, if one exists.

        Raises:
            StorageError: The storage does not respond, or the checkpoint is damaged.
        """
        self._saved = self.newest
        if not self.newest:
            return Progress()
        return checkpoint.load(
            self._storage,
            self.newest,
            self._model,
            self._optimizer,
            world=self._world,
            group=self._group,
            sync=self._sync,
        )

    def is_scheduled(self, done: int) -> bool:
        """Whether `checkpoint_every`, if set, asks for a checkpoint after `done` steps; equal on all workers."""
        return self._job.checkpoint_every is not None and done % self._job.checkpoint_every == 0

    def is_due(self) -> bool:
        """Whether to save now: rank 0 decides that the cost-optimal interval has passed, or the last save failed."""
        if self._upload is not None:
            if not self._upload.written.done():
                return False
            if self._upload.written.exception() is not None:
                return True
            self._finish_upload()
        if self._world.rank or self._job.checkpoint_every is not None:
            return False
        seconds = USUAL.shortest
        if self._cost is not None:
            seconds = interval(self._cost, self._losses_per_hour(), self._world.slots)
        return time.monotonic() - self._saved_at >= seconds

    def save(self, progress: Progress) -> None:
        """Copy the state and start writing a checkpoint of it.

        Raises:
            RunDirError: The disk is full.
            StorageError: Writing the previous checkpoint failed, in spite of retries for several minutes.
        """
        self._finish_upload()
        started = time.monotonic()
        state = checkpoint.state_of(self._model, self._optimizer, self._sync)
        is_streamed = self._job.memory == "streamed"
        if not is_streamed:
            state = self._stager.stage(state)
        self._saved_at = time.monotonic()
        written = self._thread.submit(self._write, state, progress.copy())
        self._saved = progress.step
        self._upload = _Upload(progress.step, started, self._saved_at - started, written)
        if is_streamed:  # the next step would change what is written
            self._finish_upload()

    def save_and_wait(self, progress: Progress) -> None:
        """Save a checkpoint of this step, unless it was saved already, and wait until it is safe.

        Raises:
            RunDirError: The disk is full.
            StorageError: Writing the checkpoint failed, in spite of retries for several minutes.
        """
        if self._saved != progress.step:
            self.save(progress)
        self._finish_upload()

    def _write(self, state: dict[str, Any], progress: Progress) -> float:
        checkpoint.write(self._storage, state, progress, self._job.keep, world=self._world, group=self._group)
        return time.monotonic()

    def _finish_upload(self) -> None:
        upload, self._upload = self._upload, None
        if upload is None:
            return
        waiting_since = time.monotonic()
        safe_at = upload.written.result()
        stall = upload.stall + time.monotonic() - waiting_since
        latency = max(safe_at - upload.started, stall)
        self._cost = SaveCost(stall, latency)
        if self._world.rank == 0:
            self._emit(
                Event(
                    "checkpoint",
                    self._job.stage,
                    self._job.name,
                    {"step": upload.step, "stall": round(stall, 6), "latency": round(latency, 6)},
                )
            )
