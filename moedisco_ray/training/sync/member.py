"""A member's side of a sync point: publish its weights, combine ranges of all members' weights, and load the result.

The weights are those of the sync plan's scope: the backbone, or all.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterator

from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.core.errors import DamagedError, NotFiniteError, StorageError
from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.models import ModelMap, backbone_parameters, canonical_state, config_values, open_checkpoint
from moedisco_ray.policies.sync_points import Arrival
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.job import SyncPlan, TrainJob, World
from moedisco_ray.training.metrics import TrainingMetrics
from moedisco_ray.training.sync.codec import NoCodesError
from moedisco_ray.training.sync.coded import CodedWeights, combine_coded
from moedisco_ray.training.sync.combine import combine, common_tensors
from moedisco_ray.training.sync.coordinator import MemberBoard
from moedisco_ray.training.sync.files import Roster, SyncPoint
from moedisco_ray.training.sync.layout import Layout

_SHARE = 0.02
"""Time between two messages to the board, as a part of the time waited so far: many members send few messages."""
_SHORTEST, _LONGEST = 0.2, 2.0
"""Bounds on the time between two messages to the board (s)."""


class SyncMember:
    """Takes part in a training's sync points; without a sync plan it does nothing.

    Each member keeps its own optimizer state (DiLoCo, arXiv 2311.08105, section 2). A member saves a checkpoint before
    it publishes; the checkpoint records the last sync point whose weights were loaded. So a member that died has missed
    at most the sync point that it was waiting for, and its results are the same after a restart, on a GPU up to
    rounding.

    Args:
        job: The training.
        model: Its model.
        metrics: Its metrics.
        world: This worker.
        board: Board through which the members agree; None without sync points.
        coded: What the member keeps to exchange codes; None if it exchanges weights.

    Raises:
        ValueError: The member is trained by several workers, or there is no board.
    """

    def __init__(
        self,
        job: TrainJob,
        model: PreTrainedModel,
        metrics: TrainingMetrics,
        world: World,
        board: MemberBoard | None = None,
        coded: CodedWeights | None = None,
    ) -> None:
        if job.sync is not None and (world.size > 1 or board is None):
            raise ValueError("a training with sync points must have one worker, and a board")
        self._job = job
        self._model = model
        self._metrics = metrics
        self._board = board
        self._coded = coded

    @property
    def is_over(self) -> bool:
        """Whether the common model is complete: its last sync point was loaded, if the training ends with one."""
        plan = self._job.sync
        return (
            plan is not None
            and plan.steps[-1] == self._job.steps
            and self._metrics.progress.sync_point == len(plan.steps)
        )

    def sync_before(
        self, step: int, stop: Callable[[], bool], save: Callable[[], None]
    ) -> Generator[float, None, bool]:
        """If a sync point is due before a step, publish the weights, combine them with others, and load the result.

        Args:
            step: The next step, counted from 0; the number of steps after the last one.
            stop: Function that is called while waiting; if it returns true, the wait ends.
            save: Function that saves a checkpoint and returns when the checkpoint is safe.

        Yields:
            Seconds to wait, each time it waits for other members.

        Returns:
            Whether to continue; false if the wait was stopped or took too long.
        """
        plan, progress, board = self._job.sync, self._metrics.progress, self._board
        if plan is None or board is None or progress.sync_point >= len(plan.steps):
            return True
        if step < plan.steps[progress.sync_point]:
            return True
        self._metrics.update()
        waiting_since = time.monotonic()
        latest = point_of(self._job, plan, progress.sync_point).latest()
        if latest.number == progress.sync_point:
            save()
            number = yield from self._combine(point_of(self._job, plan, latest.number + 1), plan, board, stop)
            if number is None:
                return False
            latest = point_of(self._job, plan, number)
        latest = self._load(latest, plan)
        progress.sync_point, progress.synced_step = latest.number, progress.step
        self._metrics.exclude(time.monotonic() - waiting_since)
        return True

    def _combine(
        self, point: SyncPoint, plan: SyncPlan, board: MemberBoard, stop: Callable[[], bool]
    ) -> Generator[float, None, int | None]:
        """Take part in a sync point until one is complete; return its number, or None if the wait ended before."""
        waiting_since, roster = time.monotonic(), None
        while True:
            turn = board.turn(self._job.name, point.number)
            if turn.action == "arrive":
                # A member that is late may find the folder removed meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    board.arrive(self._publish(point, plan))
                turn = board.turn(self._job.name, point.number)
            if turn.action == "load":
                return turn.number
            if stop():
                return None
            if turn.action == "combine":
                # A member that was thought to be dead may find the files removed meanwhile.
                with _suppressed_after(point):
                    roster = roster or point.roster()
                    board.finish(point.number, turn.number, self._combined(point, turn.number, roster, plan))
                continue
            if turn.action == "wait" and time.monotonic() - waiting_since >= plan.max_wait:
                return None
            yield _SHORTEST if turn.action == "stay" else _pause(time.monotonic() - waiting_since)

    def _publish(self, point: SyncPoint, plan: SyncPlan) -> Arrival:
        progress = self._metrics.progress
        tokens = (progress.step - progress.synced_step) * self._job.step_tokens
        tensors = _synced(plan, self._model)
        if self._coded is None:
            return point.publish(self._job.name, tensors, plan.ranges, tokens)
        try:
            return self._coded.publish(point, self._job.name, tensors, plan.ranges, tokens)
        except NoCodesError as error:
            raise NotFiniteError(
                f"{self._job.name}: {error} in the weights after step {progress.step}; lower the learning rate, or "
                "lengthen its warm-up",
                progress.step,
            ) from error

    def _combined(self, point: SyncPoint, place: int, roster: Roster, plan: SyncPlan) -> dict[str, Entry]:
        layout = Layout.of(_synced(plan, self._model))
        config = config_values(self._model.config)
        if self._coded is not None:
            common_N = self._coded.common(point.previous)
            return combine_coded(point, place, roster, layout, common_N, outer=plan.outer, config=config)
        start = open_checkpoint(self._job.model) if point.number == 1 else {}
        return combine(point, place, roster, layout, start, outer=plan.outer, config=config)

    def _load(self, point: SyncPoint, plan: SyncPlan) -> SyncPoint:
        """Load the common weights of a completed sync point, or of a later one; return the sync point."""
        if self._coded is None:
            _load(point, plan, self._model)
            return point
        tensors = _synced(plan, self._model)
        while True:
            follows = point.number == self._metrics.progress.sync_point + 1
            took_part = follows and point.has_combined(self._job.name)
            try:
                self._coded.load(point, tensors, took_part=took_part)
            except (FileNotFoundError, StorageError, DamagedError):
                newer = point.latest()
                if newer.number == point.number:
                    raise
                point = newer  # others have gone on meanwhile, and have deleted what was read
            else:
                return point


def coded_weights(job: TrainJob, model: PreTrainedModel) -> CodedWeights | None:
    """What a member keeps to exchange codes; None if it exchanges weights, or nothing."""
    if job.sync is None or job.sync.bits is None:
        return None
    return CodedWeights(Layout.of(_synced(job.sync, model)), functools.partial(open_checkpoint, job.model))


def _pause(waited: float) -> float:
    return min(_LONGEST, max(_SHORTEST, _SHARE * waited))


def discard_ahead(job: TrainJob) -> None:
    """Discard checkpoints with the weights of a sync point that does not exist any more, if there are sync points.

    Sync points are deleted to make a stage again whose sync points were damaged. The stage's checkpoints may be where
    only the member can delete them, such as in the storage of a data owner.

    Raises:
        StorageError: The checkpoint storage does not respond, or the newest checkpoint is damaged.
    """
    plan, storage = job.sync, checkpoint.storage_of(job)
    while plan is not None and (step := checkpoint.latest(job.checkpoints)) is not None:
        if point_of(job, plan, checkpoint.read_progress(storage, step).sync_point).is_complete:
            return
        storage.discard(step)


def load_latest(job: TrainJob, progress: Progress, model: PreTrainedModel) -> None:
    """Load the common weights of the latest sync point into a model that has missed it, if there are sync points."""
    if job.sync is None:
        return
    latest = point_of(job, job.sync, progress.sync_point).latest()
    if latest.number > progress.sync_point:
        _load(latest, job.sync, model)


def point_of(job: TrainJob, plan: SyncPlan, number: int) -> SyncPoint:
    """The files of a training's sync point."""
    return SyncPoint(plan.directory, number, plan.store, job.stage)


def _load(point: SyncPoint, plan: SyncPlan, model: PreTrainedModel) -> None:
    """Load common weights; the change of a member that was late for them is lost."""
    targets = _synced(plan, model)
    for name, tensor in common_tensors(point):
        targets[name].copy_(tensor)


def _synced(plan: SyncPlan, model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters that members exchange, by canonical name; they share the memory of the model's."""
    chosen = backbone_parameters(model) if plan.scope == "backbone" else dict(model.named_parameters())
    named = {name: parameter.detach() for name, parameter in chosen.items()}
    return canonical_state(named, ModelMap(str(model.config.model_type)))


@contextlib.contextmanager
def _suppressed_after(point: SyncPoint) -> Iterator[None]:
    """Suppress errors of missing files in the block if the sync point is complete by then."""
    try:
        yield
    except (FileNotFoundError, StorageError, DamagedError):
        if not point.is_complete:
            raise
