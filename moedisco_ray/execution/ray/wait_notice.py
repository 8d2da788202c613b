"""Warn the user once when a run has waited for machines for several seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

from moedisco_ray.core.events import Emit, Event

GRACE_SECONDS = 5.0
"""Time to wait before the warning (s), because Ray reports freed slots with a delay."""


class WaitNotice:
    """Emits at most one `warning` event per wait."""

    def __init__(self, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._clock = clock
        self._since: float | None = None
        self._warned = False

    def waiting(self, message: Callable[[], str], grace: float = GRACE_SECONDS) -> None:
        """Record that the run is waiting now; warn if the wait has lasted `grace` seconds.

        Args:
            message: Returns the text of the warning.
            grace: Time to wait before the warning (s).
        """
        if self._since is None:
            self._since = self._clock()
        if not self._warned and self._clock() - self._since >= grace:
            self._warned = True
            self._emit(Event("warning", data={"message": message()}))

    def reset(self) -> None:
        """End the wait, if there was one."""
        self._since = None
        self._warned = False
