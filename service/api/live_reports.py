"""Reports of active runs, built from the files of their finished stages."""

from __future__ import annotations

import functools
import threading
import time

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.report import report_of
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.store.locations import Location, is_uri
from service.errors import Overloaded
from service.run_storage import read, storage_of

FRESH_SECONDS = 3.0
"""Maximum age of a cached report, in seconds."""
PATIENCE_SECONDS = 3.0
"""Maximum wait for the report of another run, in seconds. A request that waits holds a thread that drivers' reports
need too."""
_MOST = 64


class LiveReports:
    """Builds one report at a time and caches it briefly, because all events of a run are read to build its report."""

    def __init__(self) -> None:
        # a slow URI delays only reports of runs at URIs
        self._locks = {False: threading.Lock(), True: threading.Lock()}
        self._kept: dict[Location, tuple[float, RunReport]] = {}

    def get(self, location: Location, config: RunConfig) -> RunReport:
        """Report of a run, at most a few seconds old. The run directory may not exist yet.

        Raises:
            NotFound: A file of the run is too large to be read whole.
            Overloaded: The report of another run takes too long, such as from a slow bucket.
            StorageUnavailable: The run's URI cannot be reached.
        """
        lock = self._locks[is_uri(location)]
        if not lock.acquire(timeout=PATIENCE_SECONDS):
            raise Overloaded("the report of another run takes long; try again later")
        try:
            return self._fresh(location, config)
        finally:
            lock.release()

    def _fresh(self, location: Location, config: RunConfig) -> RunReport:
        made, kept = self._kept.get(location, (float("-inf"), None))
        if kept is not None and time.monotonic() - made < FRESH_SECONDS:
            return kept
        report = report_of(functools.partial(read, storage_of(location)), config)
        if len(self._kept) >= _MOST:
            self._kept.pop(next(iter(self._kept)), None)
        self._kept.pop(location, None)
        self._kept[location] = (time.monotonic(), report)
        return report
