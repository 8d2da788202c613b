"""A stored run whose configuration this version refuses fails without holding up other runs."""

from __future__ import annotations

from typing import Any

import pytest
from api_client import Service
from reconciling import Scene
from sqlalchemy import update

from service.database.session import Database
from service.database.tables import RunRow

EARLIER = {"merge": {"delta_scale": 1.0}, "submodels": {"keep_moments": False}}
"""A removed setting and a renamed one."""
BROKEN: dict[str, Any] = {
    "pools": {"pools": {"low_memory": {"gone": 1}}},
    "clusters": {"clusters": {"count": 10**9}},
    "everything": {"x": 1},
}


def store(database: Database, run_id: str, changes: dict[str, Any]) -> None:
    with database.write() as session:
        run = session.get(RunRow, run_id)
        assert run is not None
        session.execute(update(RunRow).where(RunRow.id == run_id).values(config={**run.config, **changes}))


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("state", ["queued", "running"])
def test_one_unusable_run_ends_with_its_reason_and_others_start(database, tmp_path, kind, state):
    scene = Scene.on(database, tmp_path)
    broken = scene.submit(priority=5) if state == "queued" else scene.running()
    store(database, broken, BROKEN[kind])
    other = scene.submit()
    if state == "running":  # lost, so that it has to be started again
        scene.jobs.dies(scene.job(broken))
    scene.round(3)
    assert scene.run(broken).state == ("cancelled" if (kind, state) == ("pools", "running") else "failed")
    assert "cannot be used by this version" in scene.run(broken).reason
    assert scene.run(other).state == "starting"


@pytest.mark.parametrize("kind", BROKEN)
def test_an_unusable_run_is_shown_cancelled_and_deleted(api: Service, kind: str):
    run = api.submit()["id"]
    store(api.database, run, BROKEN[kind])
    assert api.ann.get("/v1/pools").status_code == 200
    shown = api.ann.get(f"/v1/runs/{run}")
    assert shown.status_code == 200
    assert shown.json()["config"].items() >= BROKEN[kind].items()
    assert api.ann.get("/v1/runs").status_code == 200
    assert "cannot be used by this version" in api.ann.get(f"/v1/runs/{run}/report").json()["state_reason"]
    assert api.ann.post(f"/v1/runs/{run}/cancel").json()["state"] == "cancelled"
    assert api.ann.delete(f"/v1/runs/{run}").status_code == 204


def test_a_run_of_an_earlier_version_is_shown_and_retried_in_the_form_of_this_one(api: Service):
    run = api.submit()["id"]
    store(api.database, run, EARLIER)
    shown = api.ann.get(f"/v1/runs/{run}").json()["config"]
    assert "delta_scale" not in shown["merge"]
    assert shown["submodels"]["keep_optimizer_state"] is False
    assert api.ann.post("/v1/estimates", json={"config": {**shown, "output": "runs"}}).status_code == 200
    answer = api.ann.post(f"/v1/runs/{run}/retry", json={"changes": {"clusters.count": 2}})
    assert answer.status_code == 201, answer.text
    assert answer.json()["config"]["submodels"]["keep_optimizer_state"] is False


def test_a_run_of_which_a_setting_is_gone_is_shown_and_not_repeated(api: Service, database, tmp_path):
    """Before: the retry had the value of today without a word."""
    gone = {"merge": {"delta_scale": 0.5}}
    run = api.submit()["id"]
    store(api.database, run, gone)
    assert api.ann.get(f"/v1/runs/{run}").status_code == 200
    assert api.ann.get(f"/v1/runs/{run}/report").status_code == 200
    answer = api.ann.post(f"/v1/runs/{run}/retry")
    assert answer.status_code == 409
    assert "merge.delta_scale 0.5 (now 1.0); submit it as a new run" in answer.text
    scene = Scene.on(database, tmp_path)
    waits = scene.submit()
    store(database, waits, gone)
    scene.round(3)
    assert scene.run(waits).state == "failed"
    assert "merge.delta_scale 0.5" in scene.run(waits).reason


def test_a_change_makes_an_unusable_run_usable_in_a_retry(api: Service):
    run = api.submit()["id"]
    store(api.database, run, BROKEN["clusters"])
    assert api.ann.post(f"/v1/runs/{run}/retry").status_code == 422
    assert api.ann.post(f"/v1/runs/{run}/retry", json={"changes": {"clusters": {}}}).status_code == 201
