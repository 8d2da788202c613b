"""Calls a function periodically in its own thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from service.errors import ServiceError
from service.observability import logger

_log = logger(__name__)
STOP_SECONDS = 30.0
"""Maximum wait for the current round when the loop stops, in seconds."""


class Loop:
    """Calls `work` every few seconds, and at once after `wake`.

    A `ServiceError` or `OSError` from `work` is logged once until it changes or `work` succeeds again. Any other error
    is a bug: it is logged with its traceback. In both cases the loop continues, because the service must keep
    supervising its runs.

    Args:
        work: Function to call with the time in seconds since the epoch.
        seconds: Pause between two rounds, in seconds.
        name: Name of the thread, also used in the log.

    Attributes:
        state: `ok`, or how the last round failed.
    """

    def __init__(self, work: Callable[[float], None], seconds: float, name: str) -> None:
        self._work = work
        self._seconds = seconds
        self.name = name
        self._woken = threading.Event()
        self._ending = False
        self._trouble: str | None = None
        self.state = "ok"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread; the first round begins at once."""
        self._thread.start()

    def wake(self) -> None:
        """Start the next round now, or right after the current round; safe from any thread."""
        self._woken.set()

    def stop(self) -> None:
        """Stop after the current round, and wait for it."""
        self._ending = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    def _run(self) -> None:
        while not self._ending:
            self._woken.clear()
            self._round()
            self._woken.wait(self._seconds)

    def _round(self) -> None:
        try:
            self._work(time.time())
        except (ServiceError, OSError) as error:
            self.state = f"cannot work: {error}"
            if str(error) != self._trouble:
                self._trouble = str(error)
                _log.warning("%s cannot work: %s", self.name, error)
        except Exception as error:  # noqa: BLE001 - the thread must survive; see the class
            self.state = f"failed ({type(error).__name__}); the log has the cause"
            self._trouble = self.state
            _log.exception("%s failed", self.name)
        else:
            self.state = "ok"
            if self._trouble is not None:
                self._trouble = None
                _log.info("%s works again", self.name)
