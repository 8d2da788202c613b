"""Events reach a service that is sometimes unreachable, once each and in order; answers of others have no effect."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moedisco_ray.cli import reporter as reporting
from moedisco_ray.cli.reporter import Reporter, Spool, portable
from moedisco_ray.core.driver_proofs import PROOF_HEADER, Claim, ReportAddress, answer_proof, content_digest
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.stop_file import StopFile

KEY = b"k" * 32


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of the stand-in."""

    status: int
    body: bytes
    proof: str | None

    def send(self, handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(self.status)
        handler.send_header("Content-Length", str(len(self.body)))
        if self.proof is not None:
            handler.send_header(PROOF_HEADER, self.proof)
        handler.end_headers()
        handler.wfile.write(self.body)


class Service:
    """A stand-in that fails at random, before or after it stores a report.

    Attributes:
        instead: Answers instead of the service; gets the proper answer, and the request.
        given: Every answer of the service itself.
        sizes: Number of events in each request.
        largest: Size of a body above which it is refused, as by the service by default (bytes).
    """

    largest = 8 * 2**20

    def __init__(self) -> None:
        self.random = random.Random(0)
        self.lines: list[dict[str, Any]] = []
        self.trouble = 0.0
        self.dismisses = False
        self.instead: Any = None
        self.given: list[Answer] = []
        self.sizes: list[int] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.sizes.append(len(json.loads(body)["events"]))
                if service.instead is not None:
                    with contextlib.suppress(OSError):  # the driver hangs up
                        service.instead(self, body)
                    return
                service.given.append(service.answer(body, self.headers))
                service.given[-1].send(self)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.address = ReportAddress(f"http://127.0.0.1:{self.server.server_port}/report", 1, KEY)

    def answer(self, body: bytes, headers: http.client.HTTPMessage) -> Answer:
        claim = Claim.of(headers)  # type: ignore[arg-type]
        if claim is None or not claim.holds(KEY) or claim.digest != content_digest(body):
            return Answer(401, b"", None)
        if len(body) > self.largest:
            return Answer(413, b"", None)
        if self.random.random() < self.trouble:
            return Answer(503, b"", None)
        report, known = json.loads(body), len(self.lines)
        if report["first"] <= known:
            self.lines += report["events"][known - report["first"] :]
        if self.random.random() < self.trouble:
            return Answer(503, b"", None)
        status = 410 if self.dismisses else 200
        content = json.dumps({"next": len(self.lines)}).encode()
        return Answer(status, content, answer_proof(KEY, claim.nonce, status, content))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(reporting, "LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(reporting, "COLLECT_SECONDS", 0.0)
    running = Service()
    yield running
    running.close()


def started(service: Service, home: Path, stop: StopFile | None = None, key: bytes = KEY) -> Reporter:
    (home / "report-to").write_text(dataclasses.replace(service.address, key=key).to_json())
    return Reporter(home / "report-to", home / "events.jsonl", stop or StopFile(home / "stop"))


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps(service: Service) -> list[int]:
    return [line["data"]["step"] for line in service.lines]


def test_every_event_arrives_once_and_in_order(service: Service, tmp_path: Path) -> None:
    service.trouble = 0.3
    reporter = started(service, tmp_path)
    log = EventLog(tmp_path / "events.jsonl", (reporter,))
    for i in range(50):
        log(Event("progress", "seed", "seed", {"step": i, "loss": float("nan")}))
    log.close()
    service.trouble = 0.0
    reporter.close()
    assert steps(service) == list(range(50))
    assert all(line["data"]["loss"] is None for line in service.lines)  # NaN is no JSON


def test_the_events_of_a_moment_go_together_and_the_last_ones_at_once(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: each event that came while no request was under way was a report of its own, 60 here."""
    monkeypatch.undo()
    reporter = started(service, tmp_path)
    log = EventLog(tmp_path / "events.jsonl", (reporter,))
    began = time.monotonic()
    for i in range(60):
        log(Event("progress", "seed", "seed", {"step": i}))
        time.sleep(0.03)
    log.close()
    passed = time.monotonic() - began
    reporter.close()
    assert time.monotonic() - began - passed < reporting.COLLECT_SECONDS
    assert steps(service) == list(range(60))
    assert len([size for size in service.sizes if size]) <= 2 + passed / reporting.COLLECT_SECONDS
    assert service.sizes.count(0) <= 2


def test_the_events_of_an_earlier_driver_are_sent_first(service: Service, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    for i in range(3):
        log(Event("warning", data={"message": str(i)}))
    log.close()
    with path.open("a") as file:
        file.write('{"type": "progre')  # it was killed while writing
    reporter = started(service, tmp_path)
    log = EventLog(path, (reporter,))
    log(Event("warning", data={"message": "3"}))
    log.close()
    reporter.close()
    assert [line["data"]["message"] for line in service.lines] == ["0", "1", "2", "3"]


def test_many_large_events_arrive_in_reports_that_are_not_too_large(service: Service, tmp_path: Path) -> None:
    """Before (af276e38): all events were in one report of 10 MB, which the service refused (413) again and again."""
    path, reporter = tmp_path / "events.jsonl", started(service, tmp_path)
    log = EventLog(path)
    for i in range(12):
        log(Event("warning", data={"step": i, "message": "x" * 900_000}))
    log.close()
    log = EventLog(path, (reporter,))
    log(Event("warning", data={"step": 12}))
    log.close()
    reporter.close()
    assert steps(service) == list(range(13))
    assert {len(line["data"].get("message", "")) for line in service.lines} == {0, 900_000}


def test_an_event_that_no_report_can_hold_is_cut_and_the_next_ones_follow(service: Service, tmp_path: Path) -> None:
    """Before (af276e38): the report was refused (413) again and again, and no later event arrived."""
    reporter = started(service, tmp_path)
    log = EventLog(tmp_path / "events.jsonl", (reporter,))
    log(Event("run_failed", data={"step": 0, "message": "y" * 9_000_000, "list": [1] * 100_000}))
    log(Event("warning", data={"step": 1, "message": "small"}))
    log.close()
    reporter.close()
    assert steps(service) == [0, 1]
    first, second = service.lines
    assert (first["type"], first["data"]) == ("run_failed", {"step": 0, "message": "y" * 1000})
    assert second["data"]["message"] == "small"


def test_a_dismissed_driver_stops_its_run(service: Service, tmp_path: Path) -> None:
    service.dismisses = True
    stop = StopFile(tmp_path / "stop")
    reporter = started(service, tmp_path, stop)
    log = EventLog(tmp_path / "events.jsonl", (reporter,))
    log(Event("heartbeat"))
    until(lambda: stop.requested)
    assert (tmp_path / "stop").read_text() == "superseded\n"
    log.close()
    reporter.close()


def dismissal_signed_by_another(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    del body
    Answer(410, b"{}", answer_proof(b"another" * 5, handler.headers["X-MoeDisco-Nonce"], 410, b"{}")).send(handler)


def dismissal_with_the_proof_of_the_request(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    del body
    Answer(410, b"{}", handler.headers[PROOF_HEADER]).send(handler)


def dismissal_with_letters_in_its_proof(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    del body
    Answer(410, b"{}", "\xe4" * 64).send(handler)


def line_far_ahead(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    del body
    Answer(200, b'{"next": 1000000}', None).send(handler)


def endless_answer(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    del body
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" " * 10_000)


def answer_in_drops(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    del body
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def large_cookie(handler: BaseHTTPRequestHandler, body: bytes) -> None:
    del body
    handler.send_response(200)
    handler.send_header("Set-Cookie", f"x={'x' * 60_000}")
    handler.end_headers()


@pytest.mark.parametrize(
    "imposter",
    [
        dismissal_signed_by_another,
        dismissal_with_the_proof_of_the_request,
        dismissal_with_letters_in_its_proof,
        line_far_ahead,
        endless_answer,
        answer_in_drops,
        large_cookie,
    ],
)
def test_what_another_program_answers_has_no_effect(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imposter: Any
) -> None:
    monkeypatch.setattr(reporting, "REQUEST_SECONDS", 0.3)
    service.instead = imposter
    stop = StopFile(tmp_path / "stop")
    reporter = started(service, tmp_path, stop)
    log = EventLog(tmp_path / "events.jsonl", (reporter,))
    log(Event("progress", "seed", "seed", {"step": 0}))
    until(lambda: len(service.sizes) >= 2)
    assert not any(service.sizes), "it got events"
    assert not stop.requested
    service.instead = None
    log(Event("progress", "seed", "seed", {"step": 1}))
    log.close()
    reporter.close()
    assert steps(service) == [0, 1]
    assert not stop.requested


def test_an_old_answer_of_the_service_is_no_answer(service: Service, tmp_path: Path) -> None:
    stop = StopFile(tmp_path / "stop")
    reporter = started(service, tmp_path, stop)
    log = EventLog(tmp_path / "events.jsonl", (reporter,))
    log(Event("progress", "seed", "seed", {"step": 0}))
    until(lambda: service.lines)
    recorded = [*service.given, Answer(410, b"{}", answer_proof(KEY, "0" * 32, 410, b"{}"))]

    def replay(handler: BaseHTTPRequestHandler, body: bytes) -> None:
        del body
        recorded[len(service.sizes) % len(recorded)].send(handler)

    service.instead, seen = replay, len(service.sizes)
    log(Event("progress", "seed", "seed", {"step": 1}))
    until(lambda: len(service.sizes) >= seen + 4)
    service.instead = None
    log(Event("progress", "seed", "seed", {"step": 2}))
    log.close()
    reporter.close()
    assert (steps(service), stop.requested) == ([0, 1, 2], False)


def test_events_go_only_to_a_service_that_has_just_proved_itself(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "PROOF_SECONDS", 0.2)
    reporter = started(service, tmp_path)
    log = EventLog(tmp_path / "events.jsonl", (reporter,))
    log(Event("progress", "seed", "seed", {"step": 0}))
    until(lambda: service.lines)
    service.instead, seen = line_far_ahead, len(service.sizes)
    time.sleep(0.3)
    log(Event("progress", "seed", "seed", {"step": 1}))
    until(lambda: len(service.sizes) >= seen + 2)
    service.instead = None
    log.close()
    reporter.close()
    assert (steps(service), any(service.sizes[seen : seen + 2])) == ([0, 1], False)


def test_after_a_failure_the_address_is_looked_up_again(service: Service, tmp_path: Path) -> None:
    reporter = started(service, tmp_path)
    log = EventLog(tmp_path / "events.jsonl", (reporter,))
    log(Event("progress", "seed", "seed", {"step": 0}))
    until(lambda: service.lines)
    service.close()
    log(Event("progress", "seed", "seed", {"step": 1}))
    elsewhere = Service()
    elsewhere.lines = list(service.lines)
    for content in ("", "{}", elsewhere.address.to_json()):
        (tmp_path / "report-to").write_text(content)
        time.sleep(0.1)
    log(Event("progress", "seed", "seed", {"step": 2}))
    log.close()
    reporter.close()
    elsewhere.close()
    assert steps(elsewhere) == [0, 1, 2]


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
