"""The real application over a database of its own, SQLite unless another is named, with a Ray that is none."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from databases import migrate
from fake_jobs import FakeJobs, FakePools
from fastapi import FastAPI
from reconciling import SECRET
from starlette.concurrency import run_in_threadpool
from starlette.testclient import TestClient

from moedisco_ray.core.driver_proofs import NONCE_BYTES, ReportAddress, request_headers
from moedisco_ray.core.records.events import Event
from service.api.app import create_app
from service.database import ingest, policies, runs, tokens
from service.database.session import Database
from service.domain.policies import Policy
from service.domain.signatures import driver_key
from service.domain.states import RunState
from service.notifier import Notifier
from service.planning import fork_server
from service.planning.fork_server import Limits
from service.planning.messages import outcome_from_json, task_to_message
from service.planning.pool import PlanningPool
from service.planning.task import Outcome, Task
from service.ray_side.dashboard import Dashboard
from service.settings import Settings

NO_DASHBOARD = "http://127.0.0.1:1"
"""Nothing listens there."""


@dataclasses.dataclass
class Service:
    """An application and what is behind it.

    Attributes:
        anonymous: A client that says nothing of itself.
        admin, ann, bob, reader: Clients with a token; `ann` and `bob` may submit, and ann up to priority 10; `reader`
            is ann's and may only look.
        wakes: How often the reconciler was asked to look.
    """

    app: FastAPI
    settings: Settings
    database: Database
    jobs: FakeJobs
    planning: PlanningPool
    pools: FakePools
    dashboard: Dashboard
    notifier: Notifier
    plain: dict[str, str]
    wakes: list[float] = dataclasses.field(default_factory=list)

    def client(self, who: str | None, **options: Any) -> TestClient:
        """A client with a token, or without."""
        headers = {} if who is None else {"Authorization": f"Bearer {self.plain[who]}"}
        return TestClient(self.app, headers=headers, **options)

    @property
    def anonymous(self) -> TestClient:
        return self.client(None)

    @property
    def admin(self) -> TestClient:
        return self.client("admin")

    @property
    def ann(self) -> TestClient:
        return self.client("ann")

    @property
    def bob(self) -> TestClient:
        return self.client("bob")

    @property
    def reader(self) -> TestClient:
        return self.client("reader")

    def submit(self, who: str = "ann", **changes: Any) -> dict[str, Any]:
        """A new run; `changes` are top-level settings."""
        answer = self.client(who).post("/v1/runs", json={"config": demo(**changes)})
        assert answer.status_code == 201, answer.text
        return answer.json()

    def upload(
        self, name: str, files: dict[str, bytes], who: str = "ann", project: str | None = None
    ) -> dict[str, Any]:
        """A data set."""
        listed = []
        for path, content in files.items():
            digest, size = hashlib.sha256(content).hexdigest(), len(content)
            headers = {"Content-Range": f"bytes 0-{size - 1}/{size}" if size else "bytes */0"}
            self.client(who).put(f"/v1/blobs/{digest}", content=content, headers=headers).raise_for_status()
            listed.append({"path": path, "bytes": size, "sha256": digest})
        body = {"name": name, "files": listed, "project": project}
        answer = self.client(who).post("/v1/datasets", json=body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json()["dataset"])

    def bring(self, run_id: str, *states: RunState, **columns: Any) -> None:
        """Take a run through states, as the reconciler would."""
        for state in states:
            with self.database.write() as session:
                run = runs.get(session, run_id)
                runs.transition(session, run, state, reason=None, now=time.time(), **columns)
            self.notifier.notify(run_id)

    def start(self, run_id: str) -> ReportAddress:
        """Bring a run to its first driver; returns where that reports, and its key."""
        self.bring(run_id, RunState.STARTING, attempt=1)
        self.bring(run_id, RunState.RUNNING)
        return self.address(run_id)

    def address(self, run_id: str, attempt: int = 1, url: str = "http://testserver") -> ReportAddress:
        """Where the driver of an attempt reports, and its key."""
        return ReportAddress(f"{url}/v1/runs/{run_id}/report", attempt, driver_key(SECRET, run_id, attempt))

    def drive(self, address: ReportAddress, report: dict[str, Any] | bytes) -> httpx.Response:
        """Send a report as the driver of an attempt does."""
        return self.anonymous.post(address.url, **signed(address, report))

    def report(self, run_id: str, *events: Event) -> None:
        """Store a driver's events without the detour over HTTP."""
        with self.database.write() as session:
            run = runs.get(session, run_id)
            ingest.take(session, run, run.next_seq, events, time.time())
        self.notifier.notify(run_id)

    def directory(self, run_id: str) -> Path:
        """The run's directory, made."""
        with self.database.read() as session:
            place = Path(runs.get(session, run_id).directory)
        place.mkdir(parents=True, exist_ok=True)
        return place


def signed(address: ReportAddress, report: dict[str, Any] | bytes) -> dict[str, Any]:
    """Body and headers of a report, as keyword arguments of httpx."""
    body = report if isinstance(report, bytes) else json.dumps(report).encode()
    headers = {"Content-Type": "application/json", **request_headers(address, os.urandom(NONCE_BYTES).hex(), body)}
    return {"content": body, "headers": headers}


class SharedPlanning(PlanningPool):
    """The processes of all services of a test run, which start again when a test has changed the environment."""

    _environment: dict[str, str] | None = None

    async def done(self, task: Task) -> Outcome:
        present = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        if present != self._environment:
            self.close()
            self._environment = present
        return await super().done(task)


PLANNING = SharedPlanning()
atexit.register(PLANNING.close)


class PlanningHere(PlanningPool):
    """Does in this process what the others do, in less than half the time, without their limits on time and memory."""

    async def done(self, task: Task) -> Outcome:
        answer = await run_in_threadpool(fork_server.answer_to, task_to_message(task), Limits())
        return outcome_from_json(answer)


def demo(**changes: Any) -> dict[str, Any]:
    """The smallest configuration."""
    return {"name": "demo", "corpus": {"sources": [{"path": "embedded"}]}} | changes


@pytest.fixture(scope="session", autouse=True)
def plain_tracebacks() -> None:
    """Log errors as the service does: without its settings, structlog draws a box around each, for a quarter second."""
    *processors, _ = structlog.get_config()["processors"]
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*processors, plain])


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Reading them takes longer than most requests."""
    return httpx.create_ssl_context()


@contextlib.contextmanager
def service(home: Path, planning: PlanningPool = PLANNING, **settings: Any) -> Iterator[Service]:
    """An application whose files are under `home`: inputs in `home/data`, runs in `home/runs`."""
    data = home / "data"
    data.mkdir(exist_ok=True)
    made = Settings(
        **{
            "state_dir": home / "state",
            "input_roots": (str(data),),
            "output_roots": (home / "runs",),
            "dashboard_url": NO_DASHBOARD,
        }
        | settings
    )
    transport = httpx.HTTPTransport(verify=_certificates())
    with (
        contextlib.closing(Database(made.database)) as database,
        contextlib.closing(Dashboard(made.dashboard_url, transport=transport)) as dashboard,
    ):
        migrate(database, made.database)
        plain = {}
        people = {
            "admin": ("root", ["admin"]),
            "ann": ("ann", ["submit"]),
            "bob": ("bob", ["submit"]),
            "reader": ("ann", ["read"]),
        }
        with database.write() as session:
            for who, (owner, scopes) in people.items():
                plain[who], _ = tokens.create(
                    session, name=who, owner=owner, scopes=scopes, expires=None, now=time.time()
                )
            policies.put(session, "ann", Policy(highest_priority=10), time.time())
        jobs, pools, notifier, wakes = FakeJobs(), FakePools(), Notifier(), []
        app = create_app(
            made,
            database,
            jobs,
            planning=planning,
            pools=pools,
            dashboard=dashboard,
            notifier=notifier,
            secret=SECRET,
            secrets_key=SECRET,
            wake_reconciler=lambda: wakes.append(time.time()),
        )
        yield Service(app, made, database, jobs, planning, pools, dashboard, notifier, plain, wakes)
