"""A callable that is called again and again, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from service.errors import ServiceError
from service.observability import logger

_log = logger(__name__)
STOP_SECONDS = 30.0


class Loop:
    """Calls `work` every few seconds, and at once when it is poked.

    A `ServiceError` or `OSError` of `work` is logged, and the next round tries again; the first of a row of equal ones, that is,
    and then the recovery. Any other error is a mistake of ours: it is logged with its trace, and the next round comes as well,
    since a service whose runs are no longer looked after helps nobody.

    Args:
        work: Gets the time, in seconds since the epoch.
        seconds: Between the end of a round and the next.
        name: Of the thread, and in the log.
    """

    def __init__(self, work: Callable[[float], None], seconds: float, name: str) -> None:
        self._work = work
        self._seconds = seconds
        self._name = name
        self._woken = threading.Event()
        self._ending = False
        self._trouble: str | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin, with a round at once."""
        self._thread.start()

    def wake(self) -> None:
        """Make the next round come now; from any thread. One under way is followed by another."""
        self._woken.set()

    def stop(self) -> None:
        """End after the round that is under way, and wait for that."""
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
            if str(error) != self._trouble:
                self._trouble = str(error)
                _log.warning("%s cannot work: %s", self._name, error)
        except Exception:  # noqa: BLE001 - the last line of defence of a thread; see above
            _log.exception("%s failed", self._name)
        else:
            if self._trouble is not None:
                self._trouble = None
                _log.info("%s works again", self._name)
