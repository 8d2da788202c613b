"""The signs of life of a trainer's process: messages from a thread, unless a step takes far longer than usual."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self

from moedisco_ray.policies.hanging import allowed_seconds

BEAT_SECONDS = 10.0
"""Interval between two messages, in seconds."""
_LATE = 3
"""Number of intervals without a turn of the thread after which the whole process, with its step, counts as stopped."""
_LAST_STEPS = 64


class Pulse:
    """Reports to the driver every 10 s for how long the training has hung; one that advances has hung for 0 s.

    Args:
        send: Sends a number of seconds to the driver, without waiting for an answer.
        compiles: Whether a step may have to compile something.
        dump: Records what all threads do; called once, when a step hangs.
        clock: Returns the current time in seconds.
    """

    def __init__(
        self,
        send: Callable[[float], object],
        *,
        compiles: bool,
        dump: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._compiles = compiles
        self._dump = dump
        self._clock = clock
        self._durations: deque[float] = deque(maxlen=_LAST_STEPS)
        self._current = (False, clock())  # whether it computes a step, and since when; replaced as a whole
        self._beaten_at = clock()
        self._dumped = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_regularly, name="pulse", daemon=True)

    def __enter__(self) -> Self:
        self._send(0.0)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def step(self, step: int | None) -> None:
        """Note that a step begins, or, with None, that one has ended."""
        now, (in_step, since) = self._clock(), self._current
        if in_step:
            self._durations.append(now - since)
        self._current = step is not None, now

    def beat(self) -> None:
        """Send one message."""
        now, (in_step, since) = self._clock(), self._current
        if now - self._beaten_at > _LATE * BEAT_SECONDS:
            self._current = in_step, now
            since = now
        self._beaten_at = now
        seconds = now - since
        hangs = seconds > allowed_seconds(tuple(self._durations), in_step=in_step, compiles=self._compiles)
        if hangs and not self._dumped:
            self._dumped = True
            self._dump()
        self._send(seconds if hangs else 0.0)

    def _beat_regularly(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.beat()
