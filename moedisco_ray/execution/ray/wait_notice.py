"""Warn the user when a run has waited for machines for several seconds, and when the cloud refuses them."""

from __future__ import annotations

import time
from collections.abc import Callable

from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.execution.ray.autoscaling import launch_failures

GRACE_SECONDS = 5.0
"""Seconds to wait before the warning, because Ray reports freed slots with a delay."""
_FAILURES_SECONDS = 20.0
"""Interval at which a wait checks whether the cloud refuses to start nodes, in seconds."""


class WaitNotice:
    """Emits at most one `warning` event per wait, and one per node type that the cloud refuses to start meanwhile."""

    def __init__(self, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._clock = clock
        self._since: float | None = None
        self._warned = False
        self._failures_at = 0.0
        self._reported: set[str] = set()

    def waiting(self, message: Callable[[], str], grace: float = GRACE_SECONDS) -> None:
        """Record that the run is waiting now; warn if the wait has lasted `grace` seconds.

        Args:
            message: Returns the text of the warning.
            grace: Seconds to wait before the warning.
        """
        now = self._clock()
        if self._since is None:
            self._since = now
        if now - self._since < grace:
            return
        if not self._warned:
            self._warned = True
            self._emit(Event("warning", data={"message": message()}))
        if now >= self._failures_at:
            self._failures_at = now + _FAILURES_SECONDS
            self._report_failures()

    def reset(self) -> None:
        """End the wait, if there was one."""
        self._since = None
        self._warned = False

    def _report_failures(self) -> None:
        for node_type, text in launch_failures.published().items():
            if node_type not in self._reported:
                self._reported.add(node_type)
                self._emit(Event("warning", data={"message": text}))
