"""The loop: look, and drain this machine's Ray when its end is announced, however often something is not up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from moedisco_ray.execution.node_agent.metadata import Notice, Provider, Unavailable
from moedisco_ray.execution.node_agent.raylets import RayAway

Drain = Callable[[Notice], Sequence[str]]
"""Drains what is not drained yet, and returns the ids of those nodes; raises `RayAway` to be called again."""

_AGAIN_SECONDS = 1.0


class _Teller:
    """Says each thing when it becomes true, and not with every poll."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last: str | None = None

    def __call__(self, line: str) -> None:
        if line != self._last:
            self._say(line)
        self._last = line


def watch(
    provider: Provider, drain: Drain, *, interval: float, stop: threading.Event, say: Callable[[str], None],
    leave_on_risk: bool = False,
) -> None:
    """Watch until stopped. A drained machine is watched on: a Ray that is started anew on it is drained too.

    Args:
        provider: The cloud's metadata service.
        drain: Tells Ray.
        interval: Seconds between two looks.
        stop: Ends the watch, after at most one interval.
        say: Takes one line per change, for a log.
        leave_on_risk: Drain at a mere risk too.
    """
    tell = _Teller(say)
    tell(f"watching {provider.name} every {interval:g} s")
    while not stop.is_set():
        began = time.monotonic()
        pause = interval
        try:
            notice = provider.look(interval)
            if notice is None:
                tell("nothing is announced")
            elif notice.kind == "risk" and not leave_on_risk:
                tell(f"{notice.reason}; nothing is done about it")
            else:
                for node in drain(notice):
                    tell(f"{notice.reason}, in {notice.deadline - time.time():.0f} s: drained Ray node {node}")
        except Unavailable as error:
            tell(f"no answer from the metadata service: {error}")
        except RayAway as error:
            tell(f"not drained yet: {error}")
            pause = min(interval, _AGAIN_SECONDS)
        stop.wait(max(0.0, pause - (time.monotonic() - began)))
