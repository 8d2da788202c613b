"""Reports of active runs, built from the files of their finished stages."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Iterator

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.report import report_of
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.store.locations import Location, is_uri
from service.errors import Overloaded
from service.run_storage import read, storage_of

FRESH_SECONDS = 3.0
"""Maximum age of a cached report, in seconds."""
PATIENCE_SECONDS = 3.0
"""Maximum wait until a report can be built, in seconds. A request that waits holds a thread that drivers' reports need
too."""
AT_ONCE = 4
"""Maximum number of reports of runs in directories that are built at the same time, and of runs at URIs."""
_MOST = 64


@dataclasses.dataclass
class _Turn:
    """The turn of requests for the report of one run.

    Attributes:
        users: Number of requests that wait for it or have it.
    """

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    users: int = 0


class LiveReports:
    """Builds the report of a run once for all who ask, and caches it briefly: all events of the run are read for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[Location, _Turn] = {}
        # a slow URI delays only reports of runs at URIs
        self._places = {False: threading.BoundedSemaphore(AT_ONCE), True: threading.BoundedSemaphore(AT_ONCE)}
        self._kept: dict[Location, tuple[float, RunReport]] = {}

    def get(self, location: Location, config: RunConfig) -> RunReport:
        """Report of a run, at most a few seconds old. The run directory may not exist yet.

        Raises:
            NotFound: A file of the run is too large to be read whole.
            Overloaded: This report or those of others take too long, such as from a slow bucket.
            StorageUnavailable: The run's URI cannot be reached.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        if (kept := self._fresh(location)) is not None:
            return kept
        with self._turn(location, deadline):
            if (kept := self._fresh(location)) is not None:
                return kept
            place = self._places[is_uri(location)]
            if not place.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise Overloaded("the reports of other runs take long; try again later")
            try:
                report = report_of(functools.partial(read, storage_of(location)), config)
            finally:
                place.release()
            self._keep(location, report)
            return report

    @contextlib.contextmanager
    def _turn(self, location: Location, deadline: float) -> Iterator[None]:
        """Wait until no other request builds the report of the run."""
        with self._lock:
            turn = self._turns.setdefault(location, _Turn())
            turn.users += 1
        try:
            if not turn.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                raise Overloaded("the report of this run takes long; try again later")
            try:
                yield
            finally:
                turn.lock.release()
        finally:
            with self._lock:
                turn.users -= 1
                if not turn.users:
                    del self._turns[location]

    def _fresh(self, location: Location) -> RunReport | None:
        with self._lock:
            made, kept = self._kept.get(location, (float("-inf"), None))
        return kept if time.monotonic() - made < FRESH_SECONDS else None

    def _keep(self, location: Location, report: RunReport) -> None:
        with self._lock:
            self._kept.pop(location, None)
            if len(self._kept) >= _MOST:
                del self._kept[next(iter(self._kept))]
            self._kept[location] = (time.monotonic(), report)
