"""The workers' side of the run's mailbox: events, and questions whose answers training does not wait for."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayActorError

from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.execution.ray.mailbox_actor import TRAININGS

_LOSS_RATE_SECONDS = 60.0
"""Interval at which a worker reads the run's rate of lost workers, in seconds."""
STOP_SECONDS = 1.0
"""Interval at which the driver and each worker check for a stop request, in seconds."""


@dataclasses.dataclass(frozen=True)
class _AttemptEmitter:
    handle: ActorHandle
    attempt: str
    box: str

    def __call__(self, event: Event) -> None:
        self.handle.push.remote(event, self.attempt, self.box)


def attempt_emitter(handle: ActorHandle, attempt: str, box: str = TRAININGS) -> Emit:
    """An `Emit` for a worker of an attempt; it does not wait for delivery."""
    return _AttemptEmitter(handle, attempt, box)


def stop_reader(handle: ActorHandle, attempt: str) -> Callable[[], bool]:
    """Return a check, which does not block training, of whether an attempt must end.

    The mailbox asks it to, or has ended itself: no one would receive the result, and the seat will end.

    Args:
        handle: The run's mailbox actor.
        attempt: Id of the attempt.
    """
    ending, asked_at = False, float("-inf")
    answers: list[Any] = []

    def requested() -> bool:
        nonlocal ending, asked_at
        if answers and ray.wait(answers, timeout=0)[0]:
            try:
                ending = ray.get(answers.pop()) or ending
            except ActorDiedError:
                ending = True
            except RayActorError:  # it does not answer now
                pass
        if not answers and not ending and time.monotonic() - asked_at >= STOP_SECONDS:
            asked_at = time.monotonic()
            answers.append(handle.is_ending.remote(attempt))
        return ending

    return requested


def loss_rate_reader(
    handle: ActorHandle, known: float, clock: Callable[[], float] = time.monotonic
) -> Callable[[], float]:
    """A function that returns the rate of lost workers (per worker-hour) in the run, without blocking training.

    Args:
        handle: The run's mailbox actor.
        known: The rate when the worker began.
        clock: Returns the current time in seconds.
    """
    asked_at = clock()
    answers: list[Any] = []

    def latest() -> float:
        nonlocal known, asked_at
        if answers and ray.wait(answers, timeout=0)[0]:
            with contextlib.suppress(RayActorError):  # the mailbox has ended, and so will this training
                known = ray.get(answers.pop())
        if not answers and clock() - asked_at >= _LOSS_RATE_SECONDS:
            asked_at = clock()
            answers.append(handle.losses_per_hour.remote())
        return known

    return latest
