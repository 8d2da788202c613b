"""A member's side of rounds: it lays its backbone down, waits for the common one, and goes on from that."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.models import config_values
from moedisco_ray.training.backbone import backbone_of
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.job import Rounds, TrainJob, World
from moedisco_ray.training.metrics import TrainingMetrics
from moedisco_ray.training.sync import exchange


class SyncMember:
    """Of a training without rounds nothing is ever due.

    The optimizer's state stays the member's own (DiLoCo, arXiv 2311.08105, section 2). A member that posts has a checkpoint, which
    knows the last round that it took in. So one that dies finds at most one round closed that it did not know, the one that
    it would have waited for, and goes on to the same bits.

    Args:
        job: With its rounds.
        model: Its backbone is exchanged.
        ledger: Its progress is told the rounds that are taken in.
        world: This process.

    Raises:
        ValueError: Several workers train one member.
    """

    def __init__(self, job: TrainJob, model: PreTrainedModel, ledger: TrainingMetrics, world: World) -> None:
        if job.rounds is not None and world.size > 1:
            raise ValueError("a member of rounds is trained by one worker")
        self._job = job
        self._rounds = job.rounds
        self._ledger = ledger
        self._backbone = {} if job.rounds is None else backbone_of(model)
        self._config = {} if job.rounds is None else config_values(model.config)

    def attend(self, step: int, stop: Callable[[], bool], secure: Callable[[], None]) -> Generator[None, None, bool]:
        """Where a meeting lies before a step: end the round, and begin the next with what it made.

        Args:
            step: The step that comes next, counted from 0.
            stop: Ends the waiting.
            secure: Returns when a checkpoint of this moment is safe.

        Yields:
            Whenever it looked for the others in vain.

        Returns:
            Whether to go on; not where it was stopped, or has stayed long enough.
        """
        progress = self._ledger.progress
        if self._rounds is None or not any(step >= at for at in self._rounds.at[progress.round:][:1]):
            return True
        self._ledger.settle()
        began = time.monotonic()
        closed = exchange.newest(self._rounds.directory, progress.round)
        if closed == progress.round:
            secure()
            with contextlib.suppress(FileNotFoundError):    # two rounds late: what it was to lie in is cleared away meanwhile
                self._post(self._rounds.directory, closed + 1)
        while closed == progress.round:
            if stop() or time.monotonic() - began >= self._rounds.stay:
                return False
            yield
            closed = exchange.newest(self._rounds.directory, progress.round)
        take_in(self._rounds, closed, self._backbone)
        self._ledger.progress.round, self._ledger.progress.joined = closed, self._ledger.progress.step
        self._ledger.leave_out(time.monotonic() - began)
        return True

    def _post(self, directory: Path, number: int) -> None:
        progress = self._ledger.progress
        post = exchange.Post(progress.step, (progress.step - progress.joined) * self._job.step_tokens)
        exchange.post(directory, number, self._job.name, self._backbone.items(), self._config, post)


def catch_up(meets: Rounds, progress: Progress, model: PreTrainedModel) -> None:
    """Let a model that nobody trains any more have the backbone of the last round, if it does not know it."""
    newest = exchange.newest(meets.directory, progress.round)
    if newest > progress.round:
        take_in(meets, newest, backbone_of(model))


@torch.no_grad()
def take_in(meets: Rounds, number: int, backbone: Mapping[str, Tensor]) -> None:
    """Put what a round made into a model's backbone, by canonical name."""
    common = exchange.backbone(meets.directory, number)
    for name, parameter in backbone.items():
        parameter.copy_(common[name])
