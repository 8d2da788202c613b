"""Says what is waited for, once each time that nothing goes on for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

from moedisco_ray.core.events import Emit, Event

PATIENCE_SECONDS = 5.0
"""For which something waits before that is said: what Ray knows of free slots is a moment old."""


class WaitNotice:
    """A wait that may begin again.

    Args:
        emit: Takes a `warning` each time.
        clock: Seconds.
    """

    def __init__(self, emit: Emit, clock: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._clock = clock
        self._since: float | None = None
        self._said = False

    def waits(self, missing: Callable[[], str], patience: float = PATIENCE_SECONDS) -> None:
        """Nothing goes on at this moment.

        Args:
            missing: For people: what is waited for.
            patience: Seconds until that is said.
        """
        if self._since is None:
            self._since = self._clock()
        if not self._said and self._clock() - self._since >= patience:
            self._said = True
            self._emit(Event("warning", data={"message": missing()}))

    def goes_on(self) -> None:
        """It is over, if there was one."""
        self._since = None
        self._said = False
