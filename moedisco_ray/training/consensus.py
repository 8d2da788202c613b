"""Lets the workers of a training agree, such as on the step at which all save and stop.

They poll each other every few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.training.job import World

T = TypeVar("T")

POLL_SECONDS = 2.0
"""Seconds between two polls. Polls are frequent, because a spot notice may leave only 30 s, and the checkpoint needs
most of this time."""
_MAX_STEPS = 64
"""Maximum number of steps between two polls. Without it, polls would be late if later steps are slower, for example
because more parameters are trained."""


class Consensus:
    """Polls yes-or-no questions on all workers; the answer is yes if any worker says yes.

    A poll is one collective operation, in which the workers also agree on the step after which to poll next. They must
    agree because each worker measures a different step time, and a worker that polls alone would wait forever. The
    first poll follows the first step, whose duration decides the next poll. A single worker polls after every step.

    Args:
        questions: The questions, in the same order on all workers.
        world: Rank and device of this worker, and the number of workers.
        clock: Function that returns the time in seconds on a monotonic clock.
    """

    def __init__(
        self, questions: Sequence[Callable[[], bool]], world: World, clock: Callable[[], float] = time.monotonic
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
        answers = torch.tensor(
            [*(float(question()) for question in self._questions), step_seconds], device=self._world.device
        )
        dist.all_reduce(answers, op=dist.ReduceOp.MAX)
        *yes, slowest = answers.tolist()
        self._polled_at = self._clock()
        self._steps = self._steps_left = steps_between(slowest)
        return [answer > 0 for answer in yes]


def steps_between(step_seconds: float) -> int:
    """Number of steps from one poll to the next, at least one, if the slowest worker needs `step_seconds` per step."""
    return max(1, int(min(_MAX_STEPS, POLL_SECONDS / max(step_seconds, 1e-9))))


def from_rank_zero(read: Callable[[], T], world: World, group: dist.ProcessGroup | None = None) -> T:
    """Call `read` on rank 0 only, and return its result or raise its error on all workers.

    If each worker called `read`, they could get different results.
    """
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


def on_all(work: Callable[[], T], world: World, group: dist.ProcessGroup | None = None) -> list[T]:
    """Do work on every worker, wait for all, and return the results by rank; an error of one worker is raised on all.

    Args:
        work: The work, without collective operations.
        world: Rank and device of this worker, and the number of workers.
        group: Process group to wait in; None: the default group.
    """
    try:
        own: Any = work()
    except (MoeDiscoError, OSError) as error:
        own = error
    results = [own]
    if world.size > 1:
        results = [None] * world.size
        dist.all_gather_object(results, own, group=group)
    failed = [own, *results] if isinstance(own, Exception) else results
    for each in failed:
        if isinstance(each, Exception):
            raise each
    return results
