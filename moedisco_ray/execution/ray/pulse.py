"""The signs of life of a trainer's process: messages from a thread, unless a step takes far longer than usual."""

from __future__ import annotations

import contextlib
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
        in_gang: Whether several workers compute a step together.
        dump: Records what all threads do; called once, when a step hangs.
        clock: Returns the current time in seconds.
    """

    def __init__(
        self,
        send: Callable[[float], object],
        *,
        compiles: bool = False,
        in_gang: bool = False,
        dump: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._compiles, self._in_gang = compiles, in_gang
        self._dump = dump
        self._clock = clock
        self._durations: deque[float] = deque(maxlen=_LAST_STEPS)
        self._lock = threading.Lock()
        self._current = (False, clock())  # whether it computes a step, and since when
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
        with self._lock:
            now, (in_step, since) = self._clock(), self._current
            if in_step:
                self._durations.append(now - since)
            self._current = step is not None, now

    def beat(self) -> None:
        """Send one message."""
        with self._lock:
            now = self._clock()
            if now - self._beaten_at > _LATE * BEAT_SECONDS:
                self._current = self._current[0], now
            self._beaten_at = now
        if self._hung_seconds() and not self._dumped:
            self._dumped = True
            with contextlib.suppress(OSError):
                self._dump()
        self._send(self._hung_seconds())

    def _hung_seconds(self) -> float:
        with self._lock:
            (in_step, since), durations = self._current, tuple(self._durations)
            seconds = self._clock() - since
        allowed = allowed_seconds(durations, in_step=in_step, compiles=self._compiles, in_gang=self._in_gang)
        return seconds if seconds > allowed else 0.0

    def _beat_regularly(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            self.beat()
