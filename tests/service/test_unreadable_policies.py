"""A stored policy that cannot be read holds up no other owner, and what it would allow is not allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from api_client import Service, demo
from reconciling import Scene
from sqlalchemy import text

from moedisco_ray.core.records.events import Event
from service.background.housekeeping import Housekeeping
from service.database import policies
from service.domain.policies import Policies, Policy, Retention
from service.domain.states import RunState

DAY = 24 * 3600.0
DAMAGED = {
    "no JSON": "{",
    "no object": "[5]",
    "null": "null",
    "unknown field": '{"gone": 1}',
    "other value": '{"active_runs": "many"}',
}


@pytest.fixture
def scene(api: Service, tmp_path: Path) -> Scene:
    with api.database.write() as session:
        policies.replace(
            session,
            Policies(
                default=Policy(active_runs=10), owners={"ann": Policy(retention=Retention(days=1)), "bob": Policy()}
            ),
            0.0,
        )
    return Scene(api.database, tmp_path, api.settings, api.jobs, api.pools)


def damage(scene: Scene, owner: str, stored: str) -> None:
    with scene.database.write() as session:
        if stored == "{" and session.get_bind().dialect.name == "postgresql":
            stored = '"{"'  # a column of PostgreSQL holds no text that is no JSON
        session.execute(
            text("UPDATE policies SET limits = :stored WHERE owner = :owner"), {"stored": stored, "owner": owner}
        )


@pytest.mark.parametrize("kind", DAMAGED)
def test_others_go_on_while_a_policy_cannot_be_read(api: Service, scene: Scene, kind: str):
    """Before (af276e38): the round ends with ValueError (no JSON) or ValidationError, and bob's run does not start."""
    running, waiting = scene.running(), scene.submit()
    damage(scene, "ann", DAMAGED[kind])
    other = scene.submit(owner="bob")
    scene.round()
    assert scene.run(other).state == "starting"
    assert (scene.run(running).state, scene.run(running).stop) == ("stopping", "policy")
    assert scene.run(waiting).reason == "its owner's policy cannot be read; an administrator has to set it again"
    refused = api.ann.post("/v1/runs", json={"config": demo()})
    assert (refused.status_code, refused.json()["title"]) == (403, "Against the policy")
    assert api.ann.post("/v1/estimates", json={"config": demo()}).status_code == 403
    assert api.bob.post("/v1/runs", json={"config": demo()}).status_code == 201
    assert {api.ann.get(page).status_code for page in ("/v1/quota", "/v1/pools", f"/v1/runs/{running}")} == {200}
    ready = api.anonymous.get("/readyz").json()
    assert (ready["status"], ready["checks"]["policies"][:23]) == ("degraded", "1 policy cannot be read")
    assert api.admin.get("/v1/policies").json()["owners"]["ann"]["active_runs"] == 0


def test_runs_continue_once_their_owners_policy_is_set_again(api: Service, scene: Scene):
    """Before (af276e38): the round ends with ValueError."""
    run_id = scene.running()
    damage(scene, "ann", "{")
    scene.round()
    scene.report(run_id, Event("run_stopped", data={"reason": "policy"}))
    scene.jobs.ends(scene.job(run_id), 3)
    scene.round()
    assert (scene.run(run_id).state, scene.run(run_id).reason) == (
        "cancelled",
        "its owner's policy cannot be read; it can be resumed once an administrator has set that policy again",
    )
    assert api.ann.post(f"/v1/runs/{run_id}/resume").status_code == 403
    assert api.admin.put("/v1/policies/owners/ann", json={}).status_code == 200
    assert api.ann.post(f"/v1/runs/{run_id}/resume").status_code == 202
    scene.round()
    assert scene.run(run_id).state == "starting"
    assert api.anonymous.get("/readyz").json()["status"] == "ok"


def test_without_a_default_policy_no_run_starts(api: Service, scene: Scene):
    """Before (af276e38): the round ends with ValidationError."""
    waiting = scene.submit(owner="bob")
    damage(scene, "*", '{"gone": 1}')
    scene.round()
    assert scene.run(waiting).state == "queued"
    assert api.bob.post("/v1/runs", json={"config": demo()}).status_code == 403
    assert api.anonymous.get("/readyz").json()["status"] == "degraded"


def test_no_run_is_removed_by_a_policy_that_cannot_be_read(api: Service, scene: Scene):
    """Before (af276e38): the round of the housekeeping ends with ValidationError, also for the runs of others."""
    mine, his = scene.submit(), scene.submit(owner="bob")
    for run_id in (mine, his):
        scene.change(run_id, RunState.CANCELLED)
    with api.database.write() as session:
        policies.put(session, "bob", Policy(retention=Retention(days=1)), 0.0)
    damage(scene, "ann", '{"retention": {"days": 1, "hours": 1}}')
    housekeeping = Housekeeping(api.database, api.jobs, api.settings.roots, DAY)
    for _ in range(4):
        scene.now += DAY
        housekeeping.round(scene.now)
    assert [api.admin.get(f"/v1/runs/{run_id}").status_code for run_id in (mine, his)] == [200, 404]
