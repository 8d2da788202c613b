"""Consensus among the workers of a training: they poll each other every few seconds, however long a step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.training.job import World

T = TypeVar("T")

_POLL_SECONDS = 2.0
"""Time between two polls (s): a spot notice may leave only 30 s, and the checkpoint needs most of it."""
_MAX_STEPS = 64
"""Maximum steps between two polls: later steps may be slower, for example if a phase trains more parameters."""


class Consensus:
    """Polls yes-or-no questions on all workers; the answer is yes if any worker says yes.

    A poll is one collective operation. In it the workers also agree on the step after which to poll next: each measures
    a different step time, and a worker that polls alone would wait forever. The first poll follows the first step, whose duration
    decides the next poll. A single worker polls after every step.

    Args:
        questions: The questions, in the same order on all workers.
        world: This process.
        clock: A monotonic clock (s).
    """

    def __init__(
        self, questions: Sequence[Callable[[], bool]], world: World, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._questions = questions
        self._world = world
        self._clock = clock
        self._polled_at = clock()
        self._steps = self._steps_left = 1

    def __call__(self) -> list[bool]:
        """Count a completed step, and return the answers; all are False if no poll is due."""
        if self._world.size == 1:
            return [question() for question in self._questions]
        self._steps_left -= 1
        if self._steps_left:
            return [False] * len(self._questions)
        step_seconds = (self._clock() - self._polled_at) / self._steps
        answers = torch.tensor([*(float(question()) for question in self._questions), step_seconds], device=self._world.device)
        dist.all_reduce(answers, op=dist.ReduceOp.MAX)
        *yes, slowest = answers.tolist()
        self._polled_at = self._clock()
        self._steps = self._steps_left = steps_between(slowest)
        return [answer > 0 for answer in yes]


def steps_between(step_seconds: float) -> int:
    """Steps from one poll to the next, at least one, for the step time of the slowest worker (s)."""
    return max(1, int(min(_MAX_STEPS, _POLL_SECONDS / max(step_seconds, 1e-9))))


def from_rank_zero(read: Callable[[], T], world: World, group: dist.ProcessGroup | None = None) -> T:
    """Call `read` on rank 0 and return its result, or raise its error, on all workers, which could get different results."""
    result: list[Any] = [None]
    if world.rank == 0:
        try:
            result = [read()]
        except (MoeDiscoError, OSError) as error:
            result = [error]
    if world.size > 1:
        dist.broadcast_object_list(result, src=0, group=group)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]
