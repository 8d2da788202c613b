"""A member's side of rounds: it lays its backbone down, waits for the common one, and goes on from that."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

import torch
from transformers import PreTrainedModel

from moedisco_ray.model_map import config_values
from moedisco_ray.training import rounds
from moedisco_ray.training.backbone import backbone_of
from moedisco_ray.training.checkpoint import Progress
from moedisco_ray.training.job import TrainJob, World


class Meeting:
    """Of a training without rounds nothing is ever due.

    The optimizer's state stays the member's own (DiLoCo, arXiv 2311.08105, section 2), and a checkpoint knows the round whose
    backbone it holds. No checkpoint is needed where a member goes on at once: one that dies trains up to the meeting again,
    to the same bits, and finds its round closed.

    Args:
        job: With its rounds.
        model: Its backbone is exchanged.
        progress: Is told the rounds that are taken in.
        world: This process.

    Raises:
        ValueError: Several workers train one member.
    """

    def __init__(self, job: TrainJob, model: PreTrainedModel, progress: Progress, world: World) -> None:
        if job.rounds is not None and world.size > 1:
            raise ValueError("a member of rounds is trained by one worker")
        self._job = job
        self._rounds = job.rounds
        self._progress = progress
        self._backbone = {} if job.rounds is None else backbone_of(model)
        self._config = {} if job.rounds is None else config_values(model.config)

    def due(self, step: int) -> bool:
        """Whether a meeting lies between the steps made so far, `step`, and the next one."""
        at = () if self._rounds is None else self._rounds.at[self._progress.round:]
        return bool(at) and step >= at[0]

    def join(self, stop: Callable[[], bool]) -> Generator[None, None, float | None]:
        """End the round, and begin the next with what it made; `progress` must be up to date.

        Yields:
            Whenever it looked in vain.

        Returns:
            Seconds it waited; None: it gave up waiting, since it was stopped or had stayed long enough.
        """
        if self._rounds is None:
            return 0.0
        directory, progress = self._rounds.directory, self._progress
        began = time.monotonic()
        closed = rounds.newest(directory, progress.round)
        if closed == progress.round:
            tokens = (progress.step - progress.joined) * self._job.step_tokens
            rounds.post(
                directory, closed + 1, self._job.name, self._backbone.items(), self._config, rounds.Post(progress.step, tokens))
        while closed == progress.round:
            yield
            closed = rounds.newest(directory, progress.round)
            if closed == progress.round and (stop() or time.monotonic() - began >= self._rounds.stay):
                return None
        self._take(closed)
        return time.monotonic() - began

    def _take(self, number: int) -> None:
        assert self._rounds is not None  # noqa: S101  # nothing is due without
        common = rounds.backbone(self._rounds.directory, number)
        with torch.no_grad():
            for name, parameter in self._backbone.items():
                parameter.copy_(common[name])
        self._progress.round, self._progress.joined = number, self._progress.step
