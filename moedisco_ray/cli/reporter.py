"""Delivery of a run's events to the control service.

`events.jsonl` is the spool: every line of it is delivered once, in order. The service responds to each report with the
number of the line that it wants next, so neither side stores how much the other has seen. While the service is
unreachable, the file grows and nothing is lost.

A run at a URI that continues on another machine finds the file as it was last uploaded, without the last lines that the
service has. So each report has the number of the driver's own first line: the service takes the lines from there on,
whatever it had stored under their numbers.

Another program may answer at the service's address while the service is down. So every answer must be signed with the
key that only the run's service and driver know; see `moedisco_ray.core.driver_proofs`. Without that proof, each answer
is a failure: the driver reads again where the service is, asks for the proof with a report that has no events, and only
then sends events. It also asks after a moment without reports, in which another program may have taken the address.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import itertools
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from moedisco_ray.core.driver_proofs import NONCE_BYTES, PROOF_HEADER, ReportAddress, is_proven, request_headers
from moedisco_ray.core.records.events import Event, events_in
from moedisco_ray.core.stop_file import StopFile

_BATCH = 1000
"""Maximum number of events in one report."""
_BATCH_BYTES = 2**19
"""Total size of lines above which a report has no further event (bytes); a larger report could be refused each time it
is sent."""
_LONGEST_LINE = 2**20
"""Maximum length of a line that is sent whole (bytes). The service accepts several such lines, and reads none that is
longer."""
_LONGEST_VALUE = 1000
"""Maximum length of a value, as JSON, of an event whose line is too long (characters)."""
_MOST_VALUES = 100
"""Maximum number of values of an event whose line is too long."""
LONGEST_PAUSE = 10.0
"""Maximum pause between two attempts to reach the service, in seconds."""
_CLOSE_SECONDS = 20.0
"""Maximum time that `close` spends on delivery, in seconds; the service later reads undelivered events from the
file."""
REQUEST_SECONDS = 30.0
"""Maximum time of one request, in seconds, also if the other side keeps sending: another program may do so for ever."""
PROOF_SECONDS = 1.0
"""Time after the service's last proof until it must prove itself again before it gets events, in seconds."""
COLLECT_SECONDS = 0.8
"""Minimum time from an answer to the next report, in seconds: the events of this time go together. It is shorter than
`PROOF_SECONDS`, after which a report without events would have to go before."""
_LARGEST_ANSWER = 2**16
"""Maximum size of an answer (bytes); those of the service are smaller."""


def no_change(prices: Mapping[str, float]) -> None:
    """Ignore the operator's prices."""
    del prices


class Reporter:
    """A listener that sends the event log from a thread of its own.

    Args:
        address: File of the service with the `ReportAddress` of this attempt. The service replaces it when its address
            changes.
        events: The run's `events.jsonl`.
        stop: Stops this run when the service says that another driver has started or that the run was deleted, because
            two drivers must not train one run.
        charge: Takes the operator's present prices, which each answer has: dollars per worker-hour, by custom resource.
    """

    def __init__(
        self, address: Path, events: Path, stop: StopFile, charge: Callable[[Mapping[str, float]], None] = no_change
    ) -> None:
        self._stop = stop
        self._events = events
        self._spool = Spool(events)
        self._opened: int | None = None
        self._service = _Service(address, charge)
        self._news = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reporter", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Wake the sending thread, which reads the event from the file."""
        del event
        if self._opened is None:
            # Only now is the log open: before, a run at a URI may have replaced the file. It ends with the driver's
            # first line.
            self._opened = self._events.stat().st_size
        self._news.set()

    def close(self) -> None:
        """Send the remaining events, for at most `_CLOSE_SECONDS` and a last request."""
        self._ending.set()
        self._news.set()
        self._thread.join()

    def _work(self) -> None:
        self._news.wait()
        if self._opened is None:
            return  # closed before the first event
        # The loop runs only during requests; it is what gives a whole request a deadline.
        with asyncio.Runner() as loop:
            try:
                self._deliver_all(loop, self._spool.count(self._opened) - 1)
            except _SupersededError:
                self._stop.request("superseded")
            finally:
                loop.run(self._service.disconnect())

    def _deliver_all(self, loop: asyncio.Runner, begin: int) -> None:
        pause, wanted, deadline = 0.0, begin, float("inf")
        answered = float("-inf")
        while True:
            # Read this flag before the file: an event that is written in between is then sent by the next round.
            ending = self._ending.is_set()
            if ending:
                deadline = min(deadline, time.monotonic() + _CLOSE_SECONDS)
            try:
                wanted = loop.run(self._deliver(begin, wanted))
                pause, answered = 0.0, time.monotonic()
            except _AwayError:
                pause = min(LONGEST_PAUSE, max(0.2, 2 * pause))
            if ending and (not pause or time.monotonic() >= deadline):
                return
            if ending:
                time.sleep(min(pause, 1.0))
            elif pause:
                self._ending.wait(pause)
            else:
                self._news.wait()
                self._ending.wait(max(0.0, answered + COLLECT_SECONDS - time.monotonic()))
                self._news.clear()

    async def _deliver(self, begin: int, wanted: int) -> int:
        """Send until the service has every line that the file has now.

        Returns the number of the line that the service wants next.
        """
        if not self._service.connected:
            wanted = await self._service.connect({"begin": begin, "first": wanted, "events": []})
        lines = self._spool.read(wanted, _BATCH)
        end = self._spool.known
        while lines:
            wanted = await self._service.send({"begin": begin, "first": wanted, "events": lines})
            # Events that came meanwhile have set `_news`, and go together with those of the next moment.
            lines = self._spool.read(wanted, _BATCH) if wanted < end else []
        return wanted


class _Service:
    """The service that takes the reports of this attempt.

    Args:
        file: File with the service's address and the key.
        charge: Takes the operator's prices of each answer.
    """

    def __init__(self, file: Path, charge: Callable[[Mapping[str, float]], None]) -> None:
        self._file = file
        self._charge = charge
        self._tls = httpx.create_ssl_context()
        self._client: httpx.AsyncClient | None = None
        self._address: ReportAddress | None = None
        self._proved = 0.0

    @property
    def connected(self) -> bool:
        """Whether the service has proved since the last failure, and a moment ago, that it knows the key."""
        return self._address is not None and time.monotonic() - self._proved < PROOF_SECONDS

    async def connect(self, report: dict[str, Any]) -> int:
        """Look the address up and send a report without events; the other arguments and errors are those of `send`."""
        try:
            address = ReportAddress.from_json(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _AwayError from error
        wanted = await self._ask(address, report)
        self._address = address
        return wanted

    async def send(self, report: dict[str, Any]) -> int:
        """Send a report to the service that has proved itself; returns the number of the line that it wants next.

        Raises:
            _AwayError: The service does not take the report now, or does not prove that it knows the key.
            _SupersededError: The service proves that it knows the key, and says that this driver is not the run's any
                more.
        """
        if self._address is None:
            raise _AwayError
        return await self._ask(self._address, report)

    async def disconnect(self) -> None:
        """Forget the service. The next client has no cookies and connections of a program that proved nothing."""
        client, self._client, self._address = self._client, None, None
        if client is not None:
            await client.aclose()

    async def _ask(self, address: ReportAddress, report: dict[str, Any]) -> int:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                status, answer = await self._exchange(address, json.dumps(report, separators=(",", ":")).encode())
            self._proved = time.monotonic()
            found = _content(status, answer)
            self._charge(found.get("prices", {}))
            return int(found["next"])
        except (_AwayError, httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            await self.disconnect()
            raise _AwayError from error

    async def _exchange(self, address: ReportAddress, body: bytes) -> tuple[int, bytes]:
        """Send a body; returns the status and the content of the answer, which the service has signed."""
        if self._client is None:
            self._client = httpx.AsyncClient(verify=self._tls, timeout=REQUEST_SECONDS)
        nonce, content = secrets.token_hex(NONCE_BYTES), b""
        headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            **request_headers(address, nonce, body),
        }
        async with self._client.stream("POST", address.url, content=body, headers=headers) as answer:
            async for block in answer.aiter_raw():
                content += block
                if len(content) > _LARGEST_ANSWER:
                    raise _AwayError
        if not is_proven(answer.headers.get(PROOF_HEADER, ""), address.key, nonce, answer.status_code, content):
            raise _AwayError
        return answer.status_code, content


class Spool:
    """The events in a growing `events.jsonl`, numbered from 0; what killed processes left of a line is not counted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets: list[int] = []
        self._end = 0

    @property
    def known(self) -> int:
        """Number of events in the file when it was last read."""
        return len(self._offsets)

    def read(self, first: int, most: int) -> list[dict[str, Any]]:
        """Read events as portable JSON, after an fsync of the file.

        At least one event is returned, unless there are no more, and few if they are large.

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
            chosen = self._offsets[first : first + most]
            events: list[dict[str, Any]] = []
            size = 0
            for offset in chosen:
                file.seek(offset)
                line = file.readline()
                size += len(line)
                if events and size > _BATCH_BYTES:
                    break
                found = [portable(dataclasses.asdict(event)) for event in events_in([line])]
                events += map(_shortened, found) if len(line) > _LONGEST_LINE else found
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
            self._offsets += [self._end for _ in events_in([line])]
            self._end += len(line)


def _shortened(event: dict[str, Any]) -> dict[str, Any]:
    """The event without its large values; texts are cut. Its line in the file keeps them."""
    data = event.get("data")
    kept: dict[str, Any] = {}
    for key, value in itertools.islice(data.items() if isinstance(data, dict) else (), _MOST_VALUES):
        if isinstance(value, str):
            kept[key[:_LONGEST_VALUE]] = value[:_LONGEST_VALUE]
        elif len(json.dumps(value)) <= _LONGEST_VALUE:
            kept[key[:_LONGEST_VALUE]] = value
    return {**event, "data": kept}


def portable(value: Any) -> Any:
    """The value as JSON that every parser and database accepts: without NaN, infinity, NUL and lone surrogates."""
    if isinstance(value, dict):
        return {portable(key): portable(child) for key, child in value.items()}
    if isinstance(value, list):
        return [portable(child) for child in value]
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _content(status: int, answer: bytes) -> dict[str, Any]:
    if status == httpx.codes.GONE:
        raise _SupersededError
    if status != httpx.codes.OK:
        raise _AwayError
    found: dict[str, Any] = json.loads(answer)
    return found


class _AwayError(Exception):
    """The service does not take the report now, or something else answers in its place."""


class _SupersededError(Exception):
    """The run has another driver, or was deleted."""
