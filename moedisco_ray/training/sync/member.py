"""A member's side of a sync point: publish its weights, wait for the common ones, and continue from them.

The weights are those of the sync plan's scope: the backbone, or all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator

from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.models import ModelMap, backbone_parameters, canonical_state, config_values
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.job import SyncPlan, TrainJob, World
from moedisco_ray.training.metrics import TrainingMetrics
from moedisco_ray.training.sharded_files import read_tensors
from moedisco_ray.training.sync import exchange


class SyncMember:
    """Takes part in a training's sync points; without a sync plan it does nothing.

    Each member keeps its own optimizer state (DiLoCo, arXiv 2311.08105, section 2). A member saves a checkpoint before
    it publishes; the checkpoint records the last sync point whose weights were loaded. So a member that died has missed
    at most the sync point that it was waiting for, and its results are bit-identical after a restart.

    Raises:
        ValueError: The member is trained by several workers.
    """

    def __init__(self, job: TrainJob, model: PreTrainedModel, metrics: TrainingMetrics, world: World) -> None:
        if job.sync is not None and world.size > 1:
            raise ValueError("a training with sync points must have one worker")
        self._job = job
        self._model = model
        self._metrics = metrics

    @property
    def is_over(self) -> bool:
        """Whether the common model is complete: its last sync point was loaded, if the training ends with one."""
        plan = self._job.sync
        return (
            plan is not None
            and plan.steps[-1] == self._job.steps
            and self._metrics.progress.sync_point == len(plan.steps)
        )

    def sync_before(self, step: int, stop: Callable[[], bool], save: Callable[[], None]) -> Generator[None, None, bool]:
        """If a sync point is due before a step, publish the member's weights, wait for the common ones and load them.

        Args:
            step: The next step, counted from 0; the number of steps after the last one.
            stop: Function that is called while waiting; if it returns true, the wait ends.
            save: Function that saves a checkpoint and returns when the checkpoint is safe.

        Yields:
            None, each time the common weights are not ready yet.

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
        _load(plan, latest, self._model)
        progress.sync_point, progress.synced_step = latest, progress.step
        self._metrics.exclude(time.monotonic() - waiting_since)
        return True

    def _publish(self, plan: SyncPlan, number: int) -> None:
        progress, config = self._metrics.progress, config_values(self._model.config)
        tensors = canonical_state(_synced(plan, self._model), ModelMap(config["model_type"]))
        record = exchange.MemberRecord(progress.step, (progress.step - progress.synced_step) * self._job.step_tokens)
        exchange.publish(
            plan.directory,
            number,
            self._job.name,
            tensors=tensors.items(),
            config=config,
            record=record,
            store=plan.store,
            stage=self._job.stage,
        )


def discard_ahead(job: TrainJob) -> None:
    """Discard checkpoints with the weights of a sync point that does not exist any more, if there are sync points.

    Sync points are deleted to make a stage again whose sync points were damaged. The stage's checkpoints may be where
    only the member can delete them, such as in the storage of a data owner.

    Raises:
        StorageError: The checkpoint storage does not respond, or the newest checkpoint is damaged.
    """
    plan, storage = job.sync, checkpoint.storage_of(job)
    while plan is not None and (step := checkpoint.latest(job.checkpoints)) is not None:
        if exchange.is_complete(plan.directory, checkpoint.read_progress(storage, step).sync_point, plan.store):
            return
        storage.discard(step)


def load_latest(job: TrainJob, progress: Progress, model: PreTrainedModel) -> None:
    """Load the common weights of the latest sync point into a model that has missed it, if there are sync points."""
    plan = job.sync
    latest = progress.sync_point if plan is None else exchange.latest(plan.directory, progress.sync_point, plan.store)
    if plan is not None and latest > progress.sync_point:
        _load(plan, latest, model)


def _load(plan: SyncPlan, number: int, model: PreTrainedModel) -> None:
    """Load common weights; the change of a member that was late for them is lost."""
    common = exchange.open_common(plan.directory, number, plan.store)
    read_tensors(_synced(plan, model), common, ModelMap(str(model.config.model_type)))


def _synced(plan: SyncPlan, model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters that members exchange, by their names in memory."""
    chosen = backbone_parameters(model) if plan.scope == "backbone" else dict(model.named_parameters())
    return {name: parameter.detach() for name, parameter in chosen.items()}
