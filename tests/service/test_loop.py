from __future__ import annotations

import threading
import time
from collections.abc import Callable

from service.background.loop import Loop
from service.errors import DatabaseUnavailable


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_loop_continues_after_errors_and_runs_at_once_when_woken():
    rounds: list[float] = []

    def work(now: float) -> None:
        rounds.append(now)
        if len(rounds) == 1:
            raise DatabaseUnavailable("gone")
        if len(rounds) == 2:
            raise ZeroDivisionError

    loop = Loop(work, 3600, "test")
    loop.start()
    for count in range(1, 5):
        eventually(lambda count=count: len(rounds) >= count)
        loop.wake()
    loop.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "test"]


def test_a_loop_that_was_never_started_can_be_stopped():
    Loop(lambda _: None, 1, "test").stop()
