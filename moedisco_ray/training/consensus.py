"""What the workers of a training decide together: they ask each other every few seconds, however long a step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from moedisco_ray.training.job import World

_ASK_SECONDS = 2.0
"""Between two questions: of the half minute that some clouds give notice, most is the checkpoint's."""
_MOST_STEPS = 64
"""Between two questions: steps may become slower than they were, as where a phase lets more learn."""


class Consensus:
    """Questions to which the answer is yes where any worker says yes.

    To ask is one collective, in which the workers also agree when they ask next: a step takes each of them another time, and who
    asked alone would wait for ever. The first question is after the first step, which tells how long one takes. A worker that is
    alone asks itself after every step.

    Args:
        questions: The same of all workers, in the same order.
        world: This process.
        clock: Seconds.
    """

    def __init__(
        self, questions: Sequence[Callable[[], bool]], world: World, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._questions = questions
        self._world = world
        self._clock = clock
        self._asked = clock()
        self._steps = self._left = 1

    def __call__(self) -> list[bool]:
        """The answers after one more step; where it is not time to ask, no to each."""
        if self._world.size == 1:
            return [question() for question in self._questions]
        self._left -= 1
        if self._left:
            return [False] * len(self._questions)
        step_seconds = (self._clock() - self._asked) / self._steps
        answers = torch.tensor([*(float(question()) for question in self._questions), step_seconds], device=self._world.device)
        dist.all_reduce(answers, op=dist.ReduceOp.MAX)
        *said, slowest = answers.tolist()
        self._asked = self._clock()
        self._steps = self._left = steps_between(slowest)
        return [answer > 0 for answer in said]


def steps_between(step_seconds: float) -> int:
    """Steps from one question to the next, at least one.

    Args:
        step_seconds: Of the slowest worker.
    """
    return max(1, int(min(_MOST_STEPS, _ASK_SECONDS / max(step_seconds, 1e-9))))
