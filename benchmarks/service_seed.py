"""A service's state directory that has seen 10,000 runs, for `service_load.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Event
from moedisco_ray.plan import build_plan
from service.bootstrap import service_secrets
from service.database import ingest, runs, tables, tokens
from service.database.ids import new_id
from service.database.session import Database
from service.domain.signatures import driver_key
from service.domain.states import RunState
from service.settings import Settings

OWNERS = 20
QUIET, DRIVERS = 50, 4
EVENTS_PER_RUN = 30


@dataclasses.dataclass(frozen=True)
class Seed:
    """What clients need to know of the database.

    Attributes:
        token: Of an administrator, who sees every run.
        ended: Some of the runs that have ended.
        quiet: Queued runs without events.
        live: A run whose driver reports while readers follow it.
        drivers: Runs whose drivers report as fast as they can.
        keys: Keys of the drivers by run, in hexadecimal digits.
    """

    token: str
    ended: list[str]
    quiet: list[str]
    live: str
    drivers: list[str]
    keys: dict[str, str]


def make(state_dir: Path, count: int) -> Seed:
    """Fill the database of a new state directory."""
    settings = Settings(state_dir=state_dir)
    with contextlib.closing(Database(settings.database)) as database:
        database.migrate()
        with database.write() as session:
            plain, _ = tokens.create(
                session, name="load", owner="root", scopes=["admin"], expires=None, now=time.time()
            )
            template = _insert(session, state_dir, "owner-0")
            _begin(session, template)
            ingest.take(session, template, 0, list(progress(0, EVENTS_PER_RUN)), time.time())
            runs.transition(session, template, RunState.SUCCEEDED, reason=None, now=time.time())
            template.disk_bytes, template.measured = 1_000_000, time.time()  # or housekeeping measures every copy
            ended = _copies(session, template.id, count - QUIET - DRIVERS - 2)
            quiet = [_insert(session, state_dir, f"owner-{i % OWNERS}") for i in range(QUIET)]
            running = [_insert(session, state_dir, f"owner-{i % OWNERS}") for i in range(DRIVERS + 1)]
            for run in running:
                _begin(session, run)
        secret = service_secrets(database, state_dir).drivers
    live, *drivers = (run.id for run in running)
    keys = {run.id: driver_key(secret, run.id, 1).hex() for run in running}
    return Seed(plain, ended[::10], [run.id for run in quiet], live, drivers, keys)


def write(seed: Seed, path: Path) -> None:
    """Leave it for the processes of the benchmark."""
    path.write_text(json.dumps(dataclasses.asdict(seed)), encoding="utf-8")


def read(path: Path) -> Seed:
    """What `write` left."""
    return Seed(**json.loads(path.read_text(encoding="utf-8")))


def progress(first: int, count: int) -> list[Event]:
    """Consecutive progress events of one sub-model, four figures each."""
    return [
        Event(
            "progress",
            "submodels",
            "submodel-0",
            {
                "step": step,
                "steps": 10_000_000,
                "tokens": 4096 * step,
                "loss": 4.0 + 1 / (1 + step),
                "lr": 3e-4,
                "grad_norm": 0.87,
                "tokens_per_second": 5230.4,
            },
            time.time(),
        )
        for step in range(first + 1, first + 1 + count)
    ]


def _insert(session: Session, state_dir: Path, owner: str) -> tables.RunRow:
    run_id = new_id()
    config = RunConfig.model_validate(
        {"name": "demo", "output": str(state_dir / "runs" / run_id), "corpus": {"sources": [{"path": "embedded"}]}}
    )
    return runs.insert(
        session,
        run_id=run_id,
        config=config,
        owner=owner,
        priority=0,
        budget_dollars=None,
        estimate=build_plan(config).model_dump(mode="json"),
        parent=None,
        now=time.time(),
    )


def _begin(session: Session, run: tables.RunRow) -> None:
    now = time.time()
    runs.transition(session, run, RunState.STARTING, reason=None, now=now, attempt=1)
    runs.transition(session, run, RunState.RUNNING, reason=None, now=now)


def _copies(session: Session, run_id: str, count: int) -> list[str]:
    """More runs with the history of one."""
    session.flush()
    made = [new_id() for _ in range(count)]
    owner = {new: f"owner-{i % OWNERS}" for i, new in enumerate(made)}
    [row] = _rows(session, tables.RunRow, tables.RunRow.id == run_id)
    session.execute(insert(tables.RunRow), [{**row, "id": new, "owner": owner[new]} for new in made])
    for table in (tables.EventRow, tables.UnitRow, tables.Point):
        rows = _rows(session, table, table.run_id == run_id)
        for new in made:
            session.execute(insert(table), [{**row, "run_id": new} for row in rows])
    return made


def _rows(session: Session, table: Any, mine: Any) -> list[dict[str, Any]]:
    columns = table.__table__.columns
    return [dict(row) for row in session.execute(select(*columns).where(mine)).mappings()]
