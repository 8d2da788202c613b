"""Events reach a service that is unreachable at times, in order and once each."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moedisco_ray.cli.reporter import Reporter, Spool, portable
from moedisco_ray.core.events import Event, EventLog
from moedisco_ray.core.stop_file import StopFile


class Service:
    """A stand-in that fails at random, before or after it stores a report."""

    def __init__(self) -> None:
        self.random = random.Random(0)
        self.lines: list[dict[str, Any]] = []
        self.trouble = 0.0
        self.refuses = False
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = service.answer(report, self.headers["Authorization"])
                body = json.dumps({"next": len(service.lines)}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/report"

    def answer(self, report: dict[str, Any], authorization: str) -> int:
        if self.refuses or authorization != "Bearer secret":
            return 401
        if self.random.random() < self.trouble:
            return 503
        known = len(self.lines)
        if report["first"] <= known:
            self.lines += report["events"][known - report["first"]:]
        return 503 if self.random.random() < self.trouble else 200


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.server.shutdown()
    running.server.server_close()


def test_every_event_arrives_once_and_in_order(service: Service, tmp_path: Path) -> None:
    service.trouble = 0.3
    path = tmp_path / "events.jsonl"
    reporter = Reporter(service.url, "secret", path, StopFile(tmp_path / "stop"))
    log = EventLog(path, (reporter,))
    for i in range(50):
        log(Event("progress", "seed", "seed", {"step": i, "loss": float("nan")}))
    log.close()
    service.trouble = 0.0
    reporter.close()
    assert [line["data"]["step"] for line in service.lines] == list(range(50))
    assert all(line["data"]["loss"] is None for line in service.lines)     # NaN is no JSON


def test_the_events_of_an_earlier_driver_are_sent_first(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for i in range(3):
        log(Event("warning", data={"message": str(i)}))
    log.close()
    with path.open("a") as file:
        file.write('{"type": "progre')     # it was killed while writing
    reporter = Reporter(service.url, "secret", path, StopFile())
    log = EventLog(path, (reporter,))
    log(Event("warning", data={"message": "3"}))
    log.close()
    reporter.close()
    assert [line["data"]["message"] for line in service.lines] == ["0", "1", "2", "3"]


def test_a_refused_driver_stops_its_run(service: Service, tmp_path: Path) -> None:
    stop = StopFile(tmp_path / "stop")
    reporter = Reporter(service.url, "an older attempt's", tmp_path / "events.jsonl", stop)
    log = EventLog(tmp_path / "events.jsonl", (reporter,))
    log(Event("heartbeat"))
    deadline = time.monotonic() + 30
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "stop").read_text() == "superseded\n"
    log.close()
    reporter.close()


def test_an_incomplete_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = Event("heartbeat", time=1.0).to_json()
    path.write_text(whole + "\n" + whole[:10])
    spool = Spool(path)
    assert len(spool.read(0, 10)) == 1
    path.write_text(whole + "\n" + whole + "\n")
    assert len(spool.read(0, 10)) == 2
    assert spool.read(1, 10) == spool.read(0, 1)


def test_values_that_other_parsers_refuse_are_replaced() -> None:
    odd = {"loss": float("nan"), "text": "a\0b\ud800", "list": [float("inf"), 1, True, None]}
    assert portable(odd) == {"loss": None, "text": "a\N{REPLACEMENT CHARACTER}b?", "list": [None, 1, True, None]}
