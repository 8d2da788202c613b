"""A run whose stored documents are poisoned: the others start, are metered and end, and every page opens."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_client import Service, service
from reconciling import FINISH, Scene

from moedisco_ray.core.records.events import Event
from service.background.housekeeping import Housekeeping
from service.database import policies
from service.domain.jobs import submission_id
from service.domain.policies import Policy
from service.domain.states import RunState

pytestmark = pytest.mark.chaos

COLUMNS = ("tags", "config", "worker_seconds", "meter", "estimate", "progress", "notes")
NO_JSON = ("{", "")
WHOLE = ("null", "[5]", "{}")
PARTS: tuple[Any, ...] = (None, [], {}, "text", -1, 2**70, 1e300, True, [None], {"a": {"b": []}})
HELD = Event("workers_held", "seed", "seed", {"hold": "h", "pool": "low_memory", "workers": 2})


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Service]:
    with service(tmp_path, max_active_runs=1000) as made:
        with made.database.write() as session:
            policies.put(session, "ann", Policy(active_runs=None), 0.0)
        yield made


def poisons(stored: str, seed: int) -> Iterator[str]:
    """Texts that are no JSON, other values, and the stored document with a part removed or replaced."""
    yield from NO_JSON
    yield from WHOLE
    draw = random.Random(seed)
    for _ in range(3):
        document = json.loads(stored)
        places = list(_places(document))
        if not places:
            return
        holder, key = draw.choice(places)
        if draw.random() < 0.3:
            del holder[key]
        else:
            holder[key] = draw.choice(PARTS)
        yield json.dumps(document)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


@pytest.mark.parametrize("column", [*COLUMNS, "data"])
@pytest.mark.parametrize("state", ["queued", "running", "stopping", "failed"])
def test_a_poisoned_run_holds_up_no_other(api: Service, tmp_path: Path, column: str, state: str):
    """The rounds are those of the reconciler and of the housekeeping.

    Before (af276e38): text that is no JSON ends each round with ValueError; the list answers 500, but not for `config`
    and `meter`.
    """
    scene = Scene(api.database, tmp_path, api.settings, api.jobs, api.pools)
    scene.pools.slots = {"low_mem_gpu": 4000, "high_mem_gpu": 4000}
    path = tmp_path / "state" / "service.sqlite3"
    table, key = ("events", "run_id") if column == "data" else ("runs", "id")
    other = begun(scene)
    stored = read(path, f"SELECT {column} FROM {table} WHERE {key} = ?", other)
    for number, poison in enumerate(poisons(stored, seed=zlib.crc32(f"{column} {state}".encode()))):
        victim = brought_to(scene, state)
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (poison, victim))
        check(api, scene, victim, other, number)
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute("DELETE FROM runs WHERE id = ?", (victim,))


def check(api: Service, scene: Scene, victim: str, other: str, number: int) -> None:
    """Whatever is stored of the victim, everything else works."""
    before = scene.run(other).dollars
    scene.round()
    scene.report(other, Event("heartbeat"))
    assert scene.run(other).dollars > before
    new = scene.submit(name=f"new-{number}")
    scene.round()
    assert scene.run(new).state == "starting"
    scene.begins(new)
    scene.report(new, FINISH)
    scene.jobs.ends(scene.job(new))
    scene.round()
    assert scene.run(new).state == "succeeded"
    Housekeeping(api.database, api.jobs, api.settings.roots, 60.0).round(scene.now)
    for page in ("", "?state=failed&state=running", "?tag=a:b"):
        assert api.admin.get(f"/v1/runs{page}").status_code == 200
    for page in ("", "/report", "/submodels", "/metrics", "/logs", "/artifacts", "/events?follow=false"):
        answer = api.admin.get(f"/v1/runs/{victim}{page}")
        assert answer.status_code == 200, answer.text
    assert api.anonymous.get("/readyz").status_code == 200
    assert api.admin.post(f"/v1/runs/{victim}/cancel").status_code in (202, 409)
    scene.jobs.ends(submission_id(victim, 1))
    scene.round(2)
    assert scene.run(victim).state in ("failed", "cancelled", "succeeded")


def begun(scene: Scene) -> str:
    run_id = scene.running(tags={"team": "vision"}, budget=1e6)
    scene.report(
        run_id, Event("stage_started", "seed"), HELD, Event("progress", "seed", "seed", {"step": 1, "tokens": 10})
    )
    scene.now += 60
    scene.report(run_id, Event("heartbeat"))
    return run_id


def brought_to(scene: Scene, state: str) -> str:
    """A run in a state, whose driver has reported."""
    if state == "queued":
        return scene.submit(tags={"team": "vision"})
    run_id = begun(scene)
    if state == "stopping":
        scene.change(run_id, RunState.STOPPING, stop="cancelled")
    if state == "failed":
        scene.report(run_id, Event("run_failed", data={"message": "no space left"}))
        scene.jobs.ends(scene.job(run_id), 1)
        scene.round()
        assert scene.run(run_id).state == "failed"
    return run_id


def read(path: Path, query: str, run_id: str) -> str:
    with contextlib.closing(sqlite3.connect(path)) as database:
        return str(database.execute(query, (run_id,)).fetchone()[0])
