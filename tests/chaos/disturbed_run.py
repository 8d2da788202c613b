"""A run that is watched over REST while the service and its drivers are killed."""

from __future__ import annotations

import contextlib
import time

import psutil
from kill_plan import Kill
from real_service import RealService
from watched_run import WAIT_SECONDS, Watcher


class Killer:
    """Carries kills out, and has what was killed come back."""

    def __init__(self, service: RealService, watcher: Watcher, run_id: str) -> None:
        self._service = service
        self._watcher = watcher
        self._run_id = run_id
        self._spawned = time.monotonic()
        self._drivers = 0

    def carry_out(self, kill: Kill) -> None:
        """Wait for the moment, kill, and leave the service starting."""
        self._await(kill)
        if kill.target == "driver":
            self._kill_driver()
        else:
            self._service.kill()
            self._service.spawn()
            self._spawned = time.monotonic()

    def _await(self, kill: Kill) -> None:
        story = self._watcher.story
        if kill.moment == "service start":
            _sleep_until(self._spawned + kill.amount)
            return
        self._service.wait_until_listening()
        if kill.moment == "driver start":
            self._watcher.wait_for(lambda story: story.starts > self._drivers)
            _sleep_until(story.started + kill.amount)
        elif kill.moment == "steps":
            self._watcher.wait_for(lambda story: story.starts > self._drivers and story.advance >= kill.amount)
        else:
            wanted = len(story.seen) + kill.amount
            self._watcher.wait_for(lambda story: len(story.seen) >= wanted)

    def _kill_driver(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not (drivers := self._service.drivers(self._run_id)):
            assert time.monotonic() < deadline, "no driver came"
            time.sleep(0.05)
        for driver in drivers:
            with contextlib.suppress(psutil.NoSuchProcess):
                driver.kill()
        psutil.wait_procs(drivers, timeout=WAIT_SECONDS)
        self._drivers = self._watcher.story.starts


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
