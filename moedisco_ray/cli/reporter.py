"""Delivery of a run's events to the control service.

`events.jsonl` is the spool: every line of it is delivered once, in order. The service responds to each report with the number of
the line that it wants next, so neither side stores how much the other has seen. While the service is unreachable, the file grows
and nothing is lost.

A run at a URI that continues on another machine finds the file as it was last uploaded, without the last lines that the service
has. So each report has the number of the driver's own first line: the service takes the lines from there on, whatever it had stored
under their numbers.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from moedisco_ray.core.events import Event
from moedisco_ray.core.stop_file import StopFile

_BATCH = 1000
"""Maximum number of events in one report."""
_LONGEST_PAUSE = 10.0
"""Maximum pause between two attempts to reach the service, in seconds."""
_CLOSE_SECONDS = 20.0
"""Maximum time that `close` spends on delivery, in seconds; the service later reads undelivered events from the file."""
_REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN, httpx.codes.NOT_FOUND)


def no_change(prices: Mapping[str, float]) -> None:
    """Ignore the operator's prices."""
    del prices


class Reporter:
    """A listener that sends the event log from a thread of its own.

    Args:
        url: URL that takes this run's reports.
        token: Token of this attempt. The service refuses it once another driver has started or the run is deleted.
        events: The run's `events.jsonl`.
        stop: Stops this run when the service refuses the token, because two drivers must not train one run.
        charge: Takes the operator's present prices, which each answer has: dollars per worker-hour, by custom resource.
    """

    def __init__(
        self, url: str, token: str, events: Path, stop: StopFile, charge: Callable[[Mapping[str, float]], None] = no_change,
    ) -> None:
        self._charge = charge
        self._url = url
        self._stop = stop
        self._events = events
        self._spool = Spool(events)
        self._opened: int | None = None
        self._client = httpx.Client(headers={"Authorization": f"Bearer {token}"}, timeout=30.0)
        self._news = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reporter", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Wake the sending thread, which reads the event from the file."""
        del event
        if self._opened is None:
            # Only now is the log open: before, a run at a URI may have replaced the file. It ends with the driver's first line.
            self._opened = self._events.stat().st_size
        self._news.set()

    def close(self) -> None:
        """Send the remaining events, for at most `_CLOSE_SECONDS`."""
        self._ending.set()
        self._news.set()
        self._thread.join()
        self._client.close()

    def _work(self) -> None:
        self._news.wait()
        if self._opened is None:
            return      # closed before the first event
        begin = self._spool.count(self._opened) - 1
        pause, wanted, deadline = 0.0, begin, float("inf")
        while True:
            # Read this flag before the file: an event that is written in between is then sent by the next round.
            ending = self._ending.is_set()
            if ending:
                deadline = min(deadline, time.monotonic() + _CLOSE_SECONDS)
            try:
                wanted = self._deliver(begin, wanted)
                pause = 0.0
            except (httpx.TransportError, _AwayError):
                pause = min(_LONGEST_PAUSE, max(0.2, 2 * pause))
            except _RefusedError:
                self._stop.request("superseded")
                return
            if ending and (not pause or time.monotonic() >= deadline):
                return
            if ending:
                time.sleep(min(pause, 1.0))
            elif pause:
                self._ending.wait(pause)
            else:
                self._news.wait()
                self._news.clear()

    def _deliver(self, begin: int, wanted: int) -> int:
        """Send until the service has every line; returns the number of the line that it wants next."""
        while lines := self._spool.read(wanted, _BATCH):
            wanted = self._send({"begin": begin, "first": wanted, "events": lines})
        return wanted

    def _send(self, report: dict[str, Any]) -> int:
        answer = self._client.post(self._url, json=report)
        if answer.status_code in _REFUSED:
            raise _RefusedError
        if answer.status_code != httpx.codes.OK:
            raise _AwayError
        found = answer.json()
        self._charge(found.get("prices", {}))
        return int(found["next"])


class Spool:
    """The complete lines of a growing `events.jsonl`, numbered from 0; unreadable lines are not counted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets: list[int] = []
        self._end = 0

    def read(self, first: int, most: int) -> list[dict[str, Any]]:
        """Read events as portable JSON, after an fsync of the file.

        Args:
            first: Number of the first event to read.
            most: Maximum number of events to read.
        """
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            # A power failure must not remove from the file what the service already has.
            os.fsync(file.fileno())
            self._scan(file)
            chosen = self._offsets[first:first + most]
            events = []
            for offset in chosen:
                file.seek(offset)
                events.append(portable(json.loads(file.readline())))
        return events

    def count(self, end: int) -> int:
        """Number of events whose lines end at or before a byte of the file."""
        with self._path.open("rb") as file:
            self._scan(file)
        return bisect.bisect_left(self._offsets, end)

    def _scan(self, file: Any) -> None:
        file.seek(self._end)
        for line in file:
            if not line.endswith(b"\n"):
                return
            if _readable(line):
                self._offsets.append(self._end)
            self._end += len(line)


def portable(value: Any) -> Any:
    """The value as JSON that every parser and database accepts: without NaN, infinity, NUL and lone surrogates."""
    if isinstance(value, dict):
        return {portable(key): portable(child) for key, child in value.items()}
    if isinstance(value, list):
        return [portable(child) for child in value]
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _readable(line: bytes) -> bool:
    try:
        Event(**json.loads(line))
    except (ValueError, TypeError):
        return False
    return True


class _AwayError(Exception):
    """The service responds, but cannot take the report now."""


class _RefusedError(Exception):
    """The service refuses the token."""
