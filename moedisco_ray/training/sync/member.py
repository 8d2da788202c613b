"""A member's side of a sync point: publish the backbone, wait for the common one, and continue from it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.models import backbone_parameters, config_values
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.job import SyncPlan, TrainJob, World
from moedisco_ray.training.metrics import TrainingMetrics
from moedisco_ray.training.sync import exchange


class SyncMember:
    """Takes part in a training's sync points; without a sync plan it does nothing.

    Each member keeps its own optimizer state (DiLoCo, arXiv 2311.08105, section 2). A member saves a checkpoint before it
    publishes; the checkpoint records the last sync point whose backbone was loaded. So a member that died has missed at most the
    sync point that it was waiting for, and its results are bit-identical after a restart.

    Raises:
        ValueError: The member is trained by several workers.
    """

    def __init__(self, job: TrainJob, model: PreTrainedModel, metrics: TrainingMetrics, world: World) -> None:
        if job.sync is not None and world.size > 1:
            raise ValueError("a sub-model with sync points must be trained by one worker")
        self._job = job
        self._metrics = metrics
        self._backbone = {} if job.sync is None else backbone_parameters(model)
        self._config = {} if job.sync is None else config_values(model.config)

    def sync_before(self, step: int, stop: Callable[[], bool], save: Callable[[], None]) -> Generator[None, None, bool]:
        """If a sync point is due before a step, publish the backbone, wait for the common one and load it.

        Args:
            step: The next step, counted from 0.
            stop: Function that is called while waiting; if it returns true, the wait ends.
            save: Function that saves a checkpoint and returns when the checkpoint is safe.

        Yields:
            None, each time the common backbone is not ready yet.

        Returns:
            Whether to continue; false if the wait was stopped or took too long.
        """
        plan, progress = self._job.sync, self._metrics.progress
        if plan is None or progress.sync_point >= len(plan.steps) or step < plan.steps[progress.sync_point]:
            return True
        self._metrics.update()
        waiting_since = time.monotonic()
        latest = exchange.latest(plan.directory, progress.sync_point, plan.store)
        if latest == progress.sync_point:
            save()
            # A member that is two sync points late may find the folder removed meanwhile.
            with contextlib.suppress(FileNotFoundError):
                self._publish(plan, latest + 1)
        while latest == progress.sync_point:
            if stop() or time.monotonic() - waiting_since >= plan.max_wait:
                return False
            yield
            latest = exchange.latest(plan.directory, progress.sync_point, plan.store)
        load_backbone(plan, latest, self._backbone)
        progress.sync_point, progress.synced_step = latest, progress.step
        self._metrics.exclude(time.monotonic() - waiting_since)
        return True

    def _publish(self, plan: SyncPlan, number: int) -> None:
        progress = self._metrics.progress
        record = exchange.MemberRecord(progress.step, (progress.step - progress.synced_step) * self._job.step_tokens)
        exchange.publish(
            plan.directory, number, self._job.name, tensors=self._backbone.items(), config=self._config, record=record,
            store=plan.store)


def load_latest_backbone(plan: SyncPlan, progress: Progress, model: PreTrainedModel) -> None:
    """Load the backbone of the latest sync point into a model that has missed it."""
    latest = exchange.latest(plan.directory, progress.sync_point, plan.store)
    if latest > progress.sync_point:
        load_backbone(plan, latest, backbone_parameters(model))


@torch.no_grad()
def load_backbone(plan: SyncPlan, number: int, parameters: Mapping[str, Tensor]) -> None:
    """Copy the backbone of a completed sync point into parameters, by canonical name."""
    backbone = exchange.open_backbone(plan.directory, number, plan.store)
    for name, parameter in parameters.items():
        parameter.copy_(backbone[name])
