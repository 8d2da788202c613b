"""Reports of active runs, built from the files of their finished stages."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.report import report_of
from moedisco_ray.core.run_record import RunReport
from service import run_files

FRESH_SECONDS = 3.0
"""Maximum age of a cached report (s)."""
_MOST = 64


class LiveReports:
    """Builds one report at a time and caches it briefly, because a report reads all events of its run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[Path, tuple[float, RunReport]] = {}

    def get(self, directory: Path, config: RunConfig) -> RunReport:
        """Report of a run directory, at most a few seconds old. The directory may not exist yet.

        Raises:
            NotFound: A file of the run is too large to be read whole.
        """
        with self._lock:
            made, kept = self._kept.get(directory, (float("-inf"), None))
            if kept is not None and self._clock() - made < FRESH_SECONDS:
                return kept
            report = report_of(functools.partial(run_files.read, directory), config)
            if len(self._kept) >= _MOST:
                self._kept.pop(next(iter(self._kept)))
            self._kept.pop(directory, None)
            self._kept[directory] = (self._clock(), report)
            return report
