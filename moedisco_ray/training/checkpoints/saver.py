"""Saves a training while it goes on: it stands still only while weights and optimizer are copied to the CPU's memory.

A thread writes the copy. The next save waits for the last one, and so does the end: whoever leaves the `with` block without an
error leaves a checkpoint that is safe. What fails in the thread is raised in the training's own, at the next save or sooner.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from moedisco_ray.core.events import Emit, Event
from moedisco_ray.policies.checkpointing import USUAL, SaveCost, interval
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.job import TrainJob, World

_TIMEOUT = timedelta(hours=1)
"""For which a worker waits for the others' uploads. One that dies is noticed at once."""


@dataclasses.dataclass(frozen=True)
class _Upload:
    """A save under way.

    Attributes:
        step: Of its checkpoint.
        started: When training began to stand still for it.
        stall: For how many seconds it did.
        written: When it was safe.
    """

    step: int
    started: float
    stall: float
    written: Future[float]


class Saver:
    """The checkpoints of one training. Every worker has one, and calls the same methods in the same order.

    Args:
        job: Where they lie, how many are kept, and what is known of losses.
        model: What is saved and restored.
        optimizer: The same.
        world: This process.
        emit: Receives a `checkpoint` event for each, on rank 0.
        losses_per_hour: What is known of a worker's losses by now; None: no more than the job says.

    Raises:
        ConfigError: There is no such storage.
    """

    def __init__(
        self, job: TrainJob, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, emit: Emit,
        losses_per_hour: Callable[[], float] | None = None,
    ) -> None:
        self._job = job
        self._model = model
        self._optimizer = optimizer
        self._world = world
        self._emit = emit
        self._losses_per_hour = losses_per_hour or (lambda: job.losses_per_hour)
        self._storage = checkpoint.storage_of(job)
        # The training's own collectives must not wait for an upload's.
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if world.size > 1 else None
        on_gpu = torch.device(world.device).type == "cuda"
        self._stager = DefaultStager(StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: _Upload | None = None
        self._saved = 0
        self._cost: SaveCost | None = None
        self._resting_since = time.monotonic()

    def __enter__(self) -> Self:
        """The saver itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Waits for the last save.

        Raises:
            MoeDiscoError: It failed, and nothing else did.
        """
        try:
            if error is None:
                self._settle()
        finally:
            self._thread.shutdown()
            self._stager.close()
            if self._group is not None:
                dist.destroy_process_group(self._group)

    @functools.cached_property
    def newest(self) -> int:
        """The step of the checkpoint that a training begins from; 0: there is none.

        Raises:
            StorageError: The storage does not answer.
        """
        return max(checkpoint.agreed(self._storage.steps, self._world, self._group), default=0)

    def restore(self) -> Progress:
        """Put the newest checkpoint into model and optimizer, where there is one.

        Raises:
            StorageError: The storage does not answer, or the checkpoint is damaged.
        """
        self._saved = self.newest
        if not self.newest:
            return Progress()
        return checkpoint.load(self._storage, self.newest, self._model, self._optimizer, self._world, self._group)

    def scheduled(self, done: int) -> bool:
        """Whether a save follows this step, where steps were set; equal on all workers."""
        return self._job.checkpoint_every is not None and done % self._job.checkpoint_every == 0

    def wanted(self) -> bool:
        """Whether this worker wants a save now: it is time, where that follows from what saves cost; or the last one failed."""
        if self._upload is not None:
            if not self._upload.written.done():
                return False
            if self._upload.written.exception() is not None:
                return True
            self._settle()
        if self._world.rank or self._job.checkpoint_every is not None:
            return False
        seconds = USUAL.shortest
        if self._cost is not None:
            seconds = interval(self._cost, self._losses_per_hour(), self._world.size)
        return time.monotonic() - self._resting_since >= seconds

    def save(self, progress: Progress) -> None:
        """Save, beside the training.

        Args:
            progress: Equal on all workers.

        Raises:
            RunDirError: The disk is full.
            StorageError: The last save could not be written for minutes.
        """
        self._settle()
        started = time.monotonic()
        state = self._stager.stage(checkpoint.state_of(self._model, self._optimizer))
        self._resting_since = time.monotonic()
        written = self._thread.submit(self._write, state, progress.copy())
        self._saved = progress.step
        self._upload = _Upload(progress.step, started, self._resting_since - started, written)

    def secure(self, progress: Progress) -> None:
        """Go on only when a checkpoint of this moment is safe.

        Args:
            progress: Equal on all workers.

        Raises:
            RunDirError: The disk is full.
            StorageError: It could not be written for minutes.
        """
        if self._saved != progress.step:
            self.save(progress)
        self._settle()

    def _write(self, state: dict[str, Any], progress: Progress) -> float:
        checkpoint.write(self._storage, state, progress, self._job.keep, self._world, self._group)
        return time.monotonic()

    def _settle(self) -> None:
        """Wait for the last save, if it is not seen to yet."""
        upload, self._upload = self._upload, None
        if upload is None:
            return
        waiting_since = time.monotonic()
        safe_at = upload.written.result()
        stall = upload.stall + time.monotonic() - waiting_since
        latency = max(safe_at - upload.started, stall)
        self._cost = SaveCost(stall, latency)
        if self._world.rank == 0:
            self._emit(Event("checkpoint", self._job.stage, self._job.name, {
                "step": upload.step, "stall": round(stall, 6), "latency": round(latency, 6)}))
