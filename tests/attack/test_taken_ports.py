"""While the service is down, another program answers on its port: runs continue, secrets and the budget are safe.

Ray is a stand-in that starts the command of each job as a thread: the real command line, with a pipeline that only logs
events.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shlex
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import typer
from api_client import PlanningHere, Service, demo, service
from reconciling import SECRET
from running_service import Running, until

from moedisco_ray.cli import reporter
from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.stop_file import StopFile
from service.background.reconciler import Reconciler
from service.database import runs, stream
from service.domain.run_paths import RunPaths
from service.ray_side.dashboard import Dashboard
from service.ray_side.jobs import RayJobs

HOUR = 3600.0
START = 1_800_000_000.0


class Ray:
    """Runs the command of one job.

    Attributes:
        events: Events that the driver logs next.
        secrets: Texts that only the service and the driver may know.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self._id = ""
        self._thread: threading.Thread | None = None
        self.events: queue.Queue[Event] = queue.Queue()
        self.secrets = [SECRET.decode()]
        pipeline = types.ModuleType("moedisco_ray.execution.pipeline")  # without Ray, which takes seconds to import
        vars(pipeline)["run"] = self._pipeline
        patch.setitem(sys.modules, pipeline.__name__, pipeline)

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def jobs(self) -> RayJobs:
        return RayJobs(Dashboard("http://ray", Path("/nowhere"), httpx.MockTransport(self._answer)))

    def log(self, *kinds: str, hours: float, **data: Any) -> None:
        """Let the driver log events."""
        for kind in kinds:
            self.events.put(Event(kind, "seed", "seed", data, START + HOUR * hours))  # type: ignore[arg-type]

    def close(self) -> None:
        """Wait for the driver, which has been asked to stop."""
        if self._thread is not None:
            self._thread.join(60)
            assert not self._thread.is_alive()

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and request.url.path == "/api/jobs/":
            self._start(json.loads(request.content))
        if self._thread is None:
            return httpx.Response(200, json=[])
        status = "RUNNING" if self.alive else "SUCCEEDED"
        return httpx.Response(200, json=[{"submission_id": self._id, "status": status}])

    def _start(self, job: dict[str, Any]) -> None:
        self._id = job["submission_id"]
        variables = job["runtime_env"]["env_vars"]
        for name, value in variables.items():
            self._patch.setenv(name, value)
        words = shlex.split(job["entrypoint"])
        file = Path(words[words.index("--report-to") + 1])
        self.secrets += [json.loads(file.read_text())["key"]] if file.exists() else [variables["MOEDISCO_RUN_TOKEN"]]
        command, arguments = typer.main.get_command(app), words[words.index("moedisco_ray") + 1 :]
        self._thread = threading.Thread(target=lambda: command.main(arguments, standalone_mode=False))
        self._thread.start()

    def _pipeline(
        self, config: RunConfig, listeners: Any, _redo: bool, *, stop: StopFile, given_id: str, **_: Any
    ) -> Path:
        config.directory.mkdir(parents=True, exist_ok=True)
        log = EventLog(config.directory / "events.jsonl", listeners)
        begun = {"id": given_id, "name": config.name, "directory": str(config.directory), "stages": ["seed"]}
        log(Event("run_started", data=begun, time=START))
        while not stop.requested:
            with contextlib.suppress(queue.Empty):
                log(self.events.get(timeout=0.02))
        log.close()
        return config.directory


class Imposter:
    """A program on the service's port that writes down what reaches it.

    Attributes:
        received: Head and body of each request.
    """

    def __init__(self, port: int, answer: Callable[[BaseHTTPRequestHandler, bytes, int], None]) -> None:
        self.received: list[str] = []
        imposter = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                imposter.received.append(f"{self.requestline}\n{self.headers}\n{body.decode()}")
                answer(self, body, len(imposter.received) - 1)

            def log_message(self, *_arguments: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        if name.lower() not in ("content-length", "connection", "transfer-encoding"):
            handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@contextlib.contextmanager
def free_port(_port: int, _home: Path) -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(received=[])


@contextlib.contextmanager
def echo(port: int, _home: Path) -> Iterator[Imposter]:
    imposter = Imposter(port, lambda handler, body, _number: send(handler, 200, body, dict(handler.headers)))
    yield imposter
    imposter.close()


ANSWERS: list[tuple[int, bytes, dict[str, str]]] = [
    (404, b"no such host", {}),
    (401, b"", {"WWW-Authenticate": "Bearer"}),
    (403, b"", {}),
    (410, b"{}", {}),
    (409, b"", {}),
    (302, b"", {"Location": "/login"}),
    (307, b"", {"Location": "/elsewhere"}),
    (200, b"<html>welcome", {}),
    (200, b'{"next": 1000}', {}),
    (200, b"", {"X-MoeDisco-Proof": "0" * 64}),
    (502, b"", {}),
]


@contextlib.contextmanager
def proxy(port: int, _home: Path) -> Iterator[Imposter]:
    """Of a service that restarts."""
    imposter = Imposter(port, lambda handler, _body, number: send(handler, *ANSWERS[number % len(ANSWERS)]))
    yield imposter
    imposter.close()


def supervised(made: Service, running: Running, ray: Ray) -> Reconciler:
    settings = made.settings.model_copy(update={"port": running.port})
    return Reconciler(made.database, ray.jobs(), made.pools, made.notifier, settings=settings, secret=SECRET)


def row(made: Service, run_id: str) -> Any:
    with made.database.read() as session:
        return runs.get(session, run_id)


@pytest.mark.parametrize(("takes_the_port", "requests"), [(free_port, 0), (proxy, len(ANSWERS))])
def test_a_run_outlasts_what_answers_on_the_port_of_its_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes_the_port: Any, requests: int
) -> None:
    """No run ends, the other program receives no secret, all events arrive, and the budget stops the run.

    Before (af276e38): "superseded" (another service, proxy); the echo had the token "mdr_..."; no event reached the new
    port.
    """
    monkeypatch.setattr(reporter, "LONGEST_PAUSE", 0.05)
    with service(tmp_path, PlanningHere()) as made, contextlib.ExitStack() as stack:
        ray, first, second = Ray(monkeypatch), Running(made), Running(made)
        asked = made.ann.post("/v1/runs", json={"config": demo(), "budget_dollars": 5.0})
        run_id = asked.json()["id"]
        stop = StopFile(RunPaths(Path(row(made, run_id).directory)).stop_file(1))
        for each in (second.stop, first.stop, ray.close, lambda: stop.request("the test has ended")):
            stack.callback(each)
        first.start()
        supervised(made, first, ray).round(time.time())
        ray.log("workers_held", hours=0, hold="h", pool="low_memory", workers=1)
        until(lambda: row(made, run_id).next_seq == 2)
        supervised(made, first, ray).round(time.time())
        assert row(made, run_id).state == "running"

        first.stop()
        with takes_the_port(first.port, tmp_path / "other") as imposter:
            for step in range(1, 4):
                ray.log("progress", hours=30 * step, step=step, steps=9, tokens=step, loss=2.0)
            deadline = time.monotonic() + 5
            while len(imposter.received) < requests and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not stop.requested, f"stopped: {stop.path.read_text()}"
            assert ray.alive
            assert not [secret for secret in ray.secrets if secret in "".join(imposter.received)]
            assert len(imposter.received) >= requests, "the driver gave up"

        second.start()
        supervised(made, second, ray).round(time.time())
        until(lambda: row(made, run_id).next_seq == 5, seconds=10)
        with made.database.read() as session:
            steps = [each.data["step"] for each in stream.read(session, run_id, -1, 1000) if each.type == "progress"]
        assert steps == [1, 2, 3]
        supervised(made, second, ray).round(time.time())
        assert (row(made, run_id).stop, stop.path.read_text()) == ("budget", "budget")
        ray.close()
