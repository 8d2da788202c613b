"""A service's background side on a fake Ray, moved along by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from databases import config
from fake_jobs import FakeJobs, FakePools

from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.locations import is_uri
from service.background.reconciler import Reconciler
from service.database import ingest, runs, stream
from service.database.ids import new_id
from service.database.session import Database
from service.database.tables import RunRow
from service.domain.jobs import submission_id
from service.domain.run_paths import RunPaths, with_run_directory
from service.notifier import Notifier
from service.settings import Settings

SECRET = b"a secret of thirty-two bytes ....."
START = Event("run_started", data={"stages": ["corpus", "seed", "clusters", "submodels"]})
FINISH = Event("run_finished", data={"seconds": 1.0})


@dataclasses.dataclass
class Scene:
    """A database, a fake Ray, and the reconciler between them; the clock goes ten seconds a round."""

    database: Database
    root: Path
    settings: Settings
    jobs: FakeJobs = dataclasses.field(default_factory=FakeJobs)
    pools: FakePools = dataclasses.field(default_factory=FakePools)
    now: float = 1_800_000_000.0

    @classmethod
    def on(cls, database: Database, root: Path, **settings: Any) -> Scene:
        state = {"state_dir": root / "state", "output_roots": (root / "runs",)}
        return cls(database, root, Settings(**(state | settings)))

    def reconciler(self) -> Reconciler:
        return Reconciler(self.database, self.jobs, self.pools, Notifier(), settings=self.settings, secret=SECRET)

    def round(self, times: int = 1) -> None:
        """Each by a reconciler of its own: it must need no memory."""
        for _ in range(times):
            self.now += 10
            self.reconciler().round(self.now)

    def submit(self, owner: str = "ann", priority: int = 0, budget: float | None = None, **changes: Any) -> str:
        run_id, asked = new_id(), config(**{"output": self.root / "runs"} | changes)
        with self.database.write() as session:
            runs.insert(
                session,
                run_id=run_id,
                config=with_run_directory(asked, run_id),
                owner=owner,
                priority=priority,
                budget_dollars=budget,
                estimate={},
                parent=None,
                now=self.now,
                home=self.root / "runs" / run_id if is_uri(asked.output) else None,
            )
        return run_id

    def running(self, **asked: Any) -> str:
        """A run whose driver has begun."""
        run_id = self.submit(**asked)
        self.round()
        self.begins(run_id)
        self.round()
        assert self.run(run_id).state == "running"
        return run_id

    def begins(self, run_id: str) -> None:
        """The driver of the present attempt starts and says so."""
        self.jobs.runs(self.job(run_id))
        self.report(run_id, START)

    def run(self, run_id: str) -> RunRow:
        with self.database.read() as session:
            run = runs.get(session, run_id)
        assert run is not None
        return run

    def job(self, run_id: str) -> str:
        return submission_id(run_id, self.run(run_id).attempt)

    def place(self, run_id: str) -> RunPaths:
        return RunPaths(Path(self.run(run_id).directory))

    def report(self, run_id: str, *events: Event) -> None:
        """The driver writes events to its log, and they arrive."""
        events = self.leave(run_id, *events)
        with self.database.write() as session:
            run = runs.lock(session, run_id)
            assert run is not None
            ingest.take(session, run, run.next_seq, events, self.now)

    def leave(self, run_id: str, *events: Event) -> tuple[Event, ...]:
        """The driver writes events to its log, and they do not arrive."""
        events = tuple(dataclasses.replace(event, time=self.now) for event in events)
        log = self.place(run_id).events
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.writelines(event.to_json() + "\n" for event in events)
        return events

    def change(self, run_id: str, state: Any, **columns: Any) -> None:
        with self.database.write() as session:
            run = runs.lock(session, run_id)
            assert run is not None
            runs.transition(session, run, state, reason=None, now=self.now, **columns)

    def states(self, run_id: str) -> Sequence[str]:
        """Every state in the run's stream."""
        with self.database.read() as session:
            return [event.data["state"] for event in stream.read(session, run_id, -1, 1000) if event.type == "state"]
