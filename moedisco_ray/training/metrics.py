"""Keeps the figures of a training: losses, speed, progress events, and the alarm when a loss is not finite."""

from __future__ import annotations

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from moedisco_ray.core.errors import NotFiniteError
from moedisco_ray.core.events import Emit, Event
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.job import TrainJob, World


class TrainingMetrics:
    """Collects each step's figures where they were computed, and reads them only now and then: a read makes a GPU wait.

    Args:
        job: What is trained.
        world: This process.
        emit: Receives progress events, on rank 0.
        progress: Is brought up to date by `settle`.
    """

    def __init__(self, job: TrainJob, world: World, emit: Emit, progress: Progress) -> None:
        self._job = job
        self._world = world
        self._emit = emit
        self.progress = progress
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._last_norm = math.nan
        self._settled_at = time.monotonic()
        self._logged_at = self._settled_at
        self._logged_step = progress.step

    def add(self, loss_sum: Tensor, grad_norm: Tensor) -> None:
        """Take a step's cross-entropy, summed over this worker's tokens, and the norm of its whole gradient."""
        self._losses.append(loss_sum)
        self._norms.append(grad_norm)

    def settle(self) -> None:
        """Read what was added: afterwards `progress` holds all of it, equal on all workers.

        Raises:
            NotFiniteError: A loss or a gradient is not finite.
        """
        if not self._losses:
            return
        losses = torch.stack(self._losses).double()
        norms = torch.stack(self._norms).tolist()
        self._losses.clear()
        self._norms.clear()
        if self._world.size > 1:
            dist.all_reduce(losses)
        means = (losses / self._job.step_tokens).tolist()
        for step, figures in enumerate(zip(means, norms, strict=True), start=self.progress.step + 1):
            for what, value in zip(("loss", "norm of the gradient"), figures, strict=True):
                if not math.isfinite(value):
                    remedy = "lower the learning rate, or lengthen its warm-up"
                    raise NotFiniteError(f"{self._job.name}: the {what} of step {step} is {value}; {remedy}", step)
        self._last_norm = norms[-1]
        now = time.monotonic()
        self.progress.step += len(means)
        self.progress.tokens += len(means) * self._job.step_tokens
        self.progress.losses += means
        self.progress.seconds += now - self._settled_at
        self._settled_at = now

    def leave_out(self, seconds: float) -> None:
        """Take off what was spent waiting; call after `settle`."""
        self._settled_at += seconds
        self._logged_at += seconds

    def log(self, lr: float) -> None:
        """Emit a progress event for the steps since the last one; call after `settle`."""
        steps = self.progress.step - self._logged_step
        now = time.monotonic()
        if self._world.rank == 0 and steps:
            self._emit(Event("progress", self._job.stage, self._job.name, {
                "step": self.progress.step,
                "steps": self._job.steps,
                "tokens": self.progress.tokens,
                "loss": sum(self.progress.losses[-steps:]) / steps,
                "lr": lr,
                "grad_norm": self._last_norm,
                "tokens_per_second": steps * self._job.step_tokens / max(now - self._logged_at, 1e-9),
            }))
        self._logged_step = self.progress.step
        self._logged_at = now
