"""A warning for people when a run has waited for machines for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

from moedisco_ray.core.events import Emit, Event

GRACE_SECONDS = 5.0
"""Wait that is not worth a warning (s): Ray's view of free slots lags by a moment."""


class WaitNotice:
    """Emits one `warning` per wait.

    Args:
        emit: Receives the warnings.
        clock: Returns seconds.
    """

    def __init__(self, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._clock = clock
        self._since: float | None = None
        self._warned = False

    def waiting(self, message: Callable[[], str], grace: float = GRACE_SECONDS) -> None:
        """Note that the run waits at this moment.

        Args:
            message: Says what it waits for.
            grace: Seconds of waiting before the warning.
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
