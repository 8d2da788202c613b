"""The metrics of a training, as events: loss, gradient norm, speed and held-out loss.

A loss that is not finite is an error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moedisco_ray.core.cards import peak_flops
from moedisco_ray.core.config import read_architecture
from moedisco_ray.core.errors import NotFiniteError
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.models import read_config
from moedisco_ray.plan.cost import flops_per_token
from moedisco_ray.plan.parameters import count_parameters
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.job import HeldOut, TrainJob, World
from moedisco_ray.training.stepper import Stepper


class TrainingMetrics:
    """Collects metrics on the device and reads them only when they are needed, because each read makes a GPU wait.

    Args:
        job: The training.
        world: Rank and device of this worker, and the number of workers.
        emit: Receives progress events, on rank 0.
        progress: Progress of the training; it is up to date only after a call of `update`.
    """

    def __init__(self, job: TrainJob, world: World, emit: Emit, progress: Progress) -> None:
        self._job = job
        self._world = world
        self._emit = emit
        self.progress = progress
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._loss_tokens: list[int] = []
        self._last_norm = math.nan
        self._updated_at = time.monotonic()
        self._logged_at = self._updated_at
        self._logged_step = progress.step
        self._flops_per_token = job_flops_per_token(job)
        self._peak = _peak_flops(world)

    def add(self, loss_sum: Tensor, grad_norm: Tensor, loss_tokens: int) -> None:
        """Add the metrics of a step.

        Args:
            loss_sum: Cross-entropy in nats, summed over this worker's tokens.
            grad_norm: Norm of the whole gradient before clipping.
            loss_tokens: Number of tokens of the global batch that the loss counts.
        """
        self._losses.append(loss_sum)
        self._norms.append(grad_norm)
        self._loss_tokens.append(loss_tokens)

    def update(self) -> None:
        """Read the metrics of all added steps into `progress`, which is then equal on all workers.

        Raises:
            NotFiniteError: A loss or a gradient norm is not finite.
        """
        if not self._losses:
            return
        losses = torch.stack(self._losses).double()
        norms = torch.stack(self._norms).tolist()
        self._losses.clear()
        self._norms.clear()
        if self._world.size > 1:
            dist.all_reduce(losses)
        means = [total / count for total, count in zip(losses.tolist(), self._loss_tokens, strict=True)]
        self._loss_tokens.clear()
        for step, values in enumerate(zip(means, norms, strict=True), start=self.progress.step + 1):
            for name, value in zip(("loss", "norm of the gradient"), values, strict=True):
                if not math.isfinite(value):
                    remedy = "lower the learning rate, or lengthen its warm-up"
                    raise NotFiniteError(f"{self._job.name}: the {name} of step {step} is {value}; {remedy}", step)
        self._last_norm = norms[-1]
        now = time.monotonic()
        self.progress.step += len(means)
        self.progress.tokens += len(means) * self._job.step_tokens
        self.progress.losses += means
        self.progress.seconds += now - self._updated_at
        self._updated_at = now

    def exclude(self, seconds: float) -> None:
        """Exclude seconds in which nothing was trained from the training time; call this method after `update`."""
        self._updated_at += seconds
        self._logged_at += seconds

    def log(self, lr: float, balance: Mapping[str, float] | None = None) -> None:
        """Emit a progress event for the steps since the last one; call it after `update`.

        Args:
            lr: Learning rate of the last step.
            balance: Figures of the expert balance (`objective.expert_balance`).
        """
        steps = self.progress.step - self._logged_step
        now = time.monotonic()
        if self._world.rank == 0 and steps:
            speed = steps * self._job.step_tokens / max(now - self._logged_at, 1e-9)
            self._emit(
                Event(
                    "progress",
                    self._job.stage,
                    self._job.name,
                    {
                        "step": self.progress.step,
                        "steps": self._job.steps,
                        "tokens": self.progress.tokens,
                        "loss": sum(self.progress.losses[-steps:]) / steps,
                        "lr": lr,
                        "grad_norm": self._last_norm,
                        "tokens_per_second": speed,
                    }
                    | ({} if self._peak is None else {"mfu": speed * self._flops_per_token / self._peak})
                    | dict(balance or {}),
                )
            )
        self._logged_step = self.progress.step
        self._logged_at = now


def job_flops_per_token(job: TrainJob) -> float:
    """Floating-point operations of a training step per token, without recomputation, as MFU counts them."""
    family = read_config(job.model)["model_type"]
    architecture = read_architecture(job.model, family)
    parameters = count_parameters(family, architecture, architecture.vocab_size or 0)
    return flops_per_token(parameters, architecture, job.sequence_length, checkpointing=False)


def _peak_flops(world: World) -> float | None:
    """Peak FLOP/s of all workers together; None for CPUs and unknown cards."""
    if not world.device.startswith("cuda"):
        return None
    peak = peak_flops(torch.cuda.get_device_name(world.device))
    return None if peak is None else peak * world.slots


class HeldOutLoss:
    """Evaluates the loss on `job.held_out`, if any, during training, without an effect on the training's result.

    Its time is no training time. Its events count the tokens of all members that share the data order (`job.share`).
    Every worker evaluates all of the text, because a forward pass of a sharded model needs all workers.
    """

    def __init__(self, job: TrainJob, stepper: Stepper, world: World, metrics: TrainingMetrics, emit: Emit) -> None:
        self._job = job
        self._stepper = stepper
        self._metrics = metrics
        self._world = world
        self._emit = emit

    def __call__(self, step: int, *, ended: bool = False) -> None:
        """Evaluate if this is due after `step` steps, or if training has ended; after the last step only then."""
        held_out = self._job.held_out
        if held_out is None or not (ended or (step % held_out.every == 0 and step < self._job.steps)):
            return
        self._metrics.update()
        began = time.monotonic()
        loss = self._loss(held_out)
        self._metrics.exclude(time.monotonic() - began)
        if self._world.rank == 0:
            self._emit(
                Event(
                    "evaluation",
                    self._job.stage,
                    self._job.name,
                    {
                        "step": step,
                        "tokens": self._job.share.taken(step) * self._job.step_tokens,
                        "held_out_loss": loss,
                    },
                )
            )

    @torch.no_grad()
    def _loss(self, held_out: HeldOut) -> float:
        """Mean cross-entropy over the tokens of the text, in nats."""
        share = -(-self._job.batch // self._world.size)
        sequences = min(self._job.optimizer.micro_batch or share, share)  # memory is enough for a training micro-batch
        nats, tokens = torch.zeros((), dtype=torch.float64, device=self._world.device), 0
        batches = held_out.batches(sequences * self._job.sequence_length)
        for loss_sum, targets_BL in self._stepper.losses(batches):
            nats += loss_sum.double()
            tokens += int((targets_BL != -100).sum())
        return nats.item() / max(1, tokens)
