"""Experiment trackers: what one has to do, and the listener that hands a run's events and its results to each of them.

Each unit, such as `submodel-0`, is a run of its own in the tracker, grouped under the tracker's run of the whole run.
`series` names the series. A resumed run continues the tracker's runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from moedisco_ray.cli.series import Points, bill_points, report_points, unit_points
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.records.metered import metered_bill
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.registry import TRACKERS, load
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.core.store.checksums import checked

_BILL_SECONDS = 60.0
"""Minimum interval between two points of the bill while a stage runs (s)."""

End = Literal["FINISHED", "FAILED", "KILLED"]

_ENDS: dict[str, End] = {"run_finished": "FINISHED", "run_failed": "FAILED", "run_stopped": "KILLED"}


class Tracker(Protocol):
    """A tracker: its name, and what its library raises if it cannot be reached."""

    name: ClassVar[str]
    errors: tuple[type[Exception], ...]

    def start(self, run_id: str) -> None:
        """Begin the tracker's run, or continue it."""

    def log(self, points: Points) -> None:
        """Log values of a unit, or of the run."""

    def results(self, report: RunReport, figures: Sequence[Path]) -> None:
        """Log samples and figures (PNG files)."""

    def end(self, how: End) -> None:
        """Flush and end all of the tracker's runs."""


Opener = Callable[[RunConfig, str | Literal[True], str], Tracker]
"""Makes a tracker of a configuration, from the value and the name of its setting."""


def trackers(config: RunConfig) -> tuple[Tracking, ...]:
    """A listener for the trackers that the configuration names; none if it names none.

    Raises:
        ConfigError: A tracker's library is not installed.
    """
    wanted: list[Tracker] = []
    for name, project in config.tracking.trackers.items():
        setting = _setting(name)
        open_tracker: Opener = load(TRACKERS[name], setting, project)
        wanted.append(open_tracker(config, project, setting))
    return (Tracking(config, wanted),) if wanted else ()


class Tracking:
    """A listener that hands a run's events to trackers.

    A tracker that cannot be reached when the run starts is an error. A tracker that fails later is left out; the run
    continues.
    """

    def __init__(self, config: RunConfig, wanted: Sequence[Tracker]) -> None:
        self._config = config
        self._wanted = wanted
        self._running: list[Tracker] = []
        self._meter = Meter()
        self._billed = 0.0
        self._end: End = "KILLED"

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        if event.type == "run_started":
            self._start(event)
        self._meter.update(event)
        points = unit_points(event)
        if points is not None:
            self._log(points)
        if event.type == "stage_finished" or (event.type == "heartbeat" and event.time > self._billed + _BILL_SECONDS):
            self._billed = event.time
            self._log(bill_points(metered_bill(self._meter, self._config)))
        if event.type == "run_finished" and self._running:
            self._finish()
        self._end = _ENDS.get(event.type, self._end)

    def close(self) -> None:
        """End the trackers' runs."""
        self._each(lambda tracker: tracker.end(self._end))

    def _start(self, event: Event) -> None:
        for earlier in EventLog.read(self._config.directory / "events.jsonl"):
            self._meter.update(earlier)  # a resumed run's dollars include the earlier attempts'
        for tracker in self._wanted:
            try:
                tracker.start(event.data["id"])
            except tracker.errors as error:
                remedy = f"the tracker cannot be used ({_first_line(error)}); correct this, or remove it"
                wanted = self._config.tracking.trackers.get(tracker.name)
                raise ConfigError(_setting(tracker.name), wanted, remedy) from error
            self._running.append(tracker)

    def _finish(self) -> None:
        from moedisco_ray.cli.figures import plot

        directory = self._config.directory
        report = RunReport.model_validate(checked(read_json(directory / "report.json")))
        drawn = plot(report, directory / "figures")
        for points in (bill_points(report.bill), *report_points(report)):
            self._log(points)
        self._each(lambda tracker: tracker.results(report, drawn))

    def _log(self, points: Points) -> None:
        self._each(lambda tracker: tracker.log(points))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._running):
            try:
                act(tracker)
            except tracker.errors as error:
                self._running.remove(tracker)
                print(
                    f"moedisco: {_setting(tracker.name)} is left out from now on: {_first_line(error)}", file=sys.stderr
                )


def _setting(name: str) -> str:
    return f"tracking.trackers.{name}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
