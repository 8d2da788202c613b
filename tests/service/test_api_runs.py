import asyncio
import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_client import demo
from rich.console import Console

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.events import Event
from service.api import submission
from service.api.security import Caller
from service.commands.output import moment
from service.commands.views import run_view
from service.database import policies
from service.domain.policies import Policy
from service.domain.states import RunState
from service.planning.task import Task
from service.schemas import RunDetail


def states(api, run_id):
    return api.ann.get(f"/v1/runs/{run_id}").json()["state"]


def run_with_text(api):
    run = api.submit()["id"]
    api.start(run)
    api.bring(run, RunState.SUCCEEDED)
    text = api.directory(run) / "corpus" / "train" / "0.parquet"
    text.parent.mkdir(parents=True)
    text.write_bytes(b"x")
    return run, {"sources": [{"path": f"run://{run}/corpus"}]}


def test_a_submitted_run_is_queued_under_its_own_directory(api):
    answer = api.ann.post("/v1/runs", json={"config": demo(tags={"team": "a"}), "priority": 3, "budget_dollars": 5})
    assert answer.status_code == 201
    run = answer.json()
    assert answer.headers["location"] == f"/v1/runs/{run['id']}"
    assert (run["state"], run["owner"], run["priority"], run["position"], run["tags"]) == (
        "queued",
        "ann",
        3,
        1,
        {"team": "a"},
    )
    assert run["config"]["output"] == str(api.settings.output_roots[0] / run["id"])
    assert run["money"]["budget_dollars"] == 5
    assert run["estimate"]["planned"]
    assert 0 < run["estimate"]["baseline"]["dollars"] < run["money"]["estimate_dollars"] == run["estimate"]["dollars"]
    assert (run["bill"]["dollars"], run["bill"]["planned"], run["bill"]["verdict"]) == (0, False, None)
    assert {stage["status"] for stage in run["stages"]} == {"waiting"}
    assert api.wakes


def test_an_active_run_has_a_forecast_from_its_plan_and_its_steps(api):
    """A stage that makes its steps at a tenth of the planned pace moves the end."""
    cards = {"low_memory": {"gpu": 1}, "high_memory": {"gpu": 1}}
    run = api.submit(pools=cards)["id"]
    assert api.ann.get(f"/v1/runs/{run}").json()["forecast"] is None, "it is queued"
    api.start(run)
    now = time.time()
    api.report(run, Event("stage_started", "corpus", time=now), Event("stage_finished", "corpus", time=now))
    planned = api.ann.get(f"/v1/runs/{run}").json()
    assert planned["forecast"]["dollars"] == pytest.approx(planned["estimate"]["dollars"], rel=1e-6)
    start = Event("stage_started", "seed", time=now - 600)
    unit = Event("unit_started", "seed", "seed", {"steps": 100, "tokens": 0, "workers": 1}, now - 600)
    step = Event("progress", "seed", "seed", {"step": 50, "steps": 100, "tokens": 50, "loss": 3.0}, now)
    api.report(run, start, unit, step)
    late = api.ann.get(f"/v1/runs/{run}").json()["forecast"]
    assert late["ends"] > planned["forecast"]["ends"] + 400
    assert late["dollars"] > planned["forecast"]["dollars"]
    shown = io.StringIO()
    Console(file=shown, width=200).print(run_view(RunDetail.model_validate(api.ann.get(f"/v1/runs/{run}").json()), ()))
    assert f"Ends at about {moment(late['ends'])}" in shown.getvalue()
    api.bring(run, RunState.CANCELLED)
    assert api.ann.get(f"/v1/runs/{run}").json()["forecast"] is None


def test_the_queue_has_places(api):
    first, second = api.submit(), api.submit()
    assert api.ann.patch(f"/v1/runs/{second['id']}", json={"priority": 5}).json()["position"] == 1
    assert api.ann.get(f"/v1/runs/{first['id']}").json()["position"] == 2


def test_paths_are_taken_from_the_input_root(api):
    (api.settings.state_dir.parent / "data" / "a.txt").write_text("text")
    run = api.submit(corpus={"sources": [{"path": "a.txt"}]})
    assert run["config"]["corpus"]["sources"][0]["path"] == f"{api.settings.input_roots[0]}/a.txt"


def test_an_idempotency_key_makes_one_run(api):
    first = api.ann.post("/v1/runs", json={"config": demo()}, headers={"Idempotency-Key": "k"})
    again = api.ann.post("/v1/runs", json={"config": demo()}, headers={"Idempotency-Key": "k"})
    assert first.json()["id"] == again.json()["id"]
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.headers["idempotency-replayed"] == "true"
    assert len(api.ann.get("/v1/runs").json()["items"]) == 1


@pytest.mark.parametrize("path", ["", "/{first}/retry"])
def test_a_repeated_request_gets_its_run_though_it_would_be_refused_by_now(api, path):
    first, corpus = run_with_text(api)
    document = {} if path else {"config": demo(name="second", corpus=corpus)}
    request = {"url": f"/v1/runs{path.format(first=first)}", "json": document, "headers": {"Idempotency-Key": "k"}}
    made = api.ann.post(**request)
    api.bring(made.json()["id"], RunState.STARTING, RunState.SUCCEEDED)
    assert api.ann.delete(f"/v1/runs/{first}").status_code == 204
    with api.database.write() as session:
        policies.put(session, "ann", Policy(resources=["other"]), time.time())
    again = api.ann.post(**request)
    assert (again.status_code, again.headers.get("idempotency-replayed")) == (201, "true"), again.text
    assert again.json()["id"] == made.json()["id"]


def test_an_idempotency_key_with_another_body_is_a_conflict(api):
    api.ann.post("/v1/runs", json={"config": demo()}, headers={"Idempotency-Key": "k"})
    other = api.ann.post("/v1/runs", json={"config": demo(seed=1)}, headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["type"]) == (409, "urn:moedisco:problem:key-reused")


def test_idempotency_keys_of_two_owners_are_two(api):
    runs = {
        client.post("/v1/runs", json={"config": demo()}, headers={"Idempotency-Key": "k"}).json()["id"]
        for client in (api.ann, api.bob)
    }
    assert len(runs) == 2


def test_equal_requests_at_once_make_one_run(api):
    barrier = threading.Barrier(6)

    def ask(_):
        barrier.wait()
        return api.ann.post("/v1/runs", json={"config": demo()}, headers={"Idempotency-Key": "k"}).json()["id"]

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(ask, range(6)))) == 1


def test_a_key_whose_run_was_deleted_says_so(api):
    run = api.ann.post("/v1/runs", json={"config": demo()}, headers={"Idempotency-Key": "k"}).json()
    assert api.ann.delete(f"/v1/runs/{run['id']}").status_code == 204
    again = api.ann.post("/v1/runs", json={"config": demo()}, headers={"Idempotency-Key": "k"})
    assert again.status_code == 409
    assert "deleted" in again.json()["detail"]


def test_runs_are_found_by_state_name_tag_and_owner(api):
    one, other = api.submit(name="alpha", tags={"team": "x:y"}), api.submit("bob", name="beta")
    api.bring(other["id"], RunState.CANCELLED)

    def found(**query):
        return [run["id"] for run in api.admin.get("/v1/runs", params=query).json()["items"]]

    assert found(state="queued") == [one["id"]]
    assert found(state=["queued", "cancelled"]) == [other["id"], one["id"]]
    assert found(name="LPH") == [one["id"]]
    assert found(tag="team:x:y") == [one["id"]]
    assert found(tag=["team:x:y", "b:c"]) == []
    assert found(owner="bob") == [other["id"]]


def test_a_run_is_its_owners_and_an_administrators(api):
    run = api.submit()["id"]
    for path in (
        "",
        "/events",
        "/metrics",
        "/submodels",
        "/clusters",
        "/report",
        "/logs",
        "/logs/driver",
        "/artifacts",
        "/artifacts/x",
        "/model.tar",
    ):
        assert api.bob.get(f"/v1/runs/{run}{path}").status_code == 404
    for method, path in (("PATCH", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/resume"), ("POST", "/retry")):
        body = {} if method != "DELETE" else None
        assert api.bob.request(method, f"/v1/runs/{run}{path}", json=body).status_code == 404
    assert api.bob.get("/v1/runs").json()["items"] == []
    assert api.bob.get("/v1/runs", params={"owner": "ann"}).json()["items"] == []
    assert api.admin.get(f"/v1/runs/{run}").json()["owner"] == "ann"
    assert api.reader.get(f"/v1/runs/{run}").status_code == 200


@pytest.mark.parametrize("run_id", ["x", "01M87KCP88DHR1ACAYZM4TS1P7", "%00", "..%2f..", "\ud7ff"])
def test_a_run_that_is_none_is_not_found(shared, run_id):
    assert shared.ann.get(f"/v1/runs/{run_id}").status_code == 404


def test_what_is_left_out_of_a_change_stays(api):
    run = api.submit(tags={"a": "b"})["id"]
    changed = api.ann.patch(f"/v1/runs/{run}", json={"name": "Better name", "budget_dollars": 2.5}).json()
    assert (changed["name"], changed["tags"], changed["money"]["budget_dollars"]) == ("Better name", {"a": "b"}, 2.5)
    assert api.ann.patch(f"/v1/runs/{run}", json={}).status_code == 200


def test_a_change_of_tags_is_a_merge_patch(api):
    run = api.submit(tags={"a": "b", "c": "d"})["id"]

    def patched(**tags):
        return api.ann.patch(f"/v1/runs/{run}", json={"tags": tags})

    assert patched(a=None, e="f", absent=None).json()["tags"] == {"c": "d", "e": "f"}
    assert patched().json()["tags"] == {"c": "d", "e": "f"}
    answer = patched(**{f"k{i}": "v" for i in range(15)})
    assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "tags")
    assert patched(c=None, **{f"k{i}": "v" for i in range(15)}).status_code == 200


def test_a_budget_is_removed_by_null(api):
    run = api.ann.post("/v1/runs", json={"config": demo(), "budget_dollars": 5}).json()["id"]

    def budget_of_retry(key, **document):
        answer = api.ann.post(f"/v1/runs/{run}/retry", json=document, headers={"Idempotency-Key": key})
        return answer.json()["money"]["budget_dollars"] if answer.status_code == 201 else answer.status_code

    assert budget_of_retry("a") == 5
    assert budget_of_retry("b", budget_dollars=None) is None
    assert budget_of_retry("b") == 409  # it is another request
    assert budget_of_retry("c", budget_dollars=7) == 7
    assert api.ann.patch(f"/v1/runs/{run}", json={"priority": 1, "name": None}).json()["money"]["budget_dollars"] == 5
    assert api.ann.patch(f"/v1/runs/{run}", json={"budget_dollars": None}).json()["money"]["budget_dollars"] is None
    assert api.ann.get(f"/v1/runs/{run}").json()["name"] == "demo"


def test_a_queued_run_is_cancelled_at_once_and_may_be_resumed(api):
    run = api.submit()["id"]
    assert api.ann.post(f"/v1/runs/{run}/cancel").json()["state"] == "cancelled"
    assert api.ann.post(f"/v1/runs/{run}/cancel").status_code == 202
    resumed = api.ann.post(f"/v1/runs/{run}/resume")
    assert (resumed.status_code, resumed.json()["state"]) == (202, "queued")


def test_a_running_run_is_asked_to_stop(api):
    run = api.submit()["id"]
    api.start(run)
    answer = api.ann.post(f"/v1/runs/{run}/cancel", json={"force": False})
    assert (answer.status_code, answer.json()["state"], answer.json()["reason"]) == (202, "stopping", "cancelled")
    forced = api.ann.post(f"/v1/runs/{run}/cancel", json={"force": True})
    assert (forced.json()["state"], "killed" in forced.json()["reason"]) == ("stopping", True)


def test_an_ended_run_is_not_cancelled(api):
    run = api.submit()["id"]
    api.start(run)
    api.bring(run, RunState.SUCCEEDED)
    answer = api.ann.post(f"/v1/runs/{run}/cancel")
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:moedisco:problem:illegal-transition")
    assert api.ann.post(f"/v1/runs/{run}/resume").status_code == 409


def test_a_run_without_budget_left_is_not_resumed(api):
    run = api.submit()["id"]
    api.start(run)
    api.bring(run, RunState.STOPPING)
    api.bring(run, RunState.CANCELLED, dollars=3.0, budget_dollars=2.0)
    assert "budget" in api.ann.post(f"/v1/runs/{run}/resume").json()["detail"]
    api.ann.patch(f"/v1/runs/{run}", json={"budget_dollars": 4})
    assert api.ann.post(f"/v1/runs/{run}/resume").status_code == 202


def test_a_retry_is_a_new_run_with_changes(api):
    parent = api.submit(name="first", tags={"a": "b"})
    changes = {"tokens.total": 5_000_000, "corpus.sources.0.weight": 2, "clusters.count": 2, "deterministic": True}
    answer = api.ann.post(f"/v1/runs/{parent['id']}/retry", json={"changes": changes, "priority": 7})
    assert answer.status_code == 201
    run = answer.json()
    assert (run["parent"], run["priority"], run["tags"]) == (parent["id"], 7, {"a": "b"})
    assert run["config"]["tokens"]["total"] == 5_000_000
    assert run["config"]["corpus"]["sources"][0] == parent["config"]["corpus"]["sources"][0] | {"weight": 2}
    assert run["config"]["output"] == str(api.settings.output_roots[0] / run["id"])


def test_a_retry_may_be_without_changes_and_has_keys(api):
    parent = api.submit()["id"]
    made = {api.ann.post(f"/v1/runs/{parent}/retry", headers={"Idempotency-Key": "r"}).json()["id"] for _ in range(2)}
    assert len(made) == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tokens.totl": 1}, "config.tokens.totl"),
        ({"corpus.sources.7.path": "x"}, "config.corpus.sources.7.path"),
        ({"name.x": 1}, "config.name.x"),
        ({"corpus.sources.0.path": "/etc/passwd"}, "config.corpus.sources.0.path"),
        ({"clusters.count": 3}, "config.clusters.count"),
        ({"": 1}, "config"),
        ({"a..b": 1}, "config.a"),
        ({"model.config.num_experts": 10**12}, "config.model.config.num_experts"),
        ({"corpus.sources": []}, "config.corpus.sources"),
    ],
)
def test_an_invalid_change_is_named_by_its_field(shared, changes, field):
    parent = shared.submit()["id"]
    answer = shared.ann.post(f"/v1/runs/{parent}/retry", json={"changes": changes})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"].startswith(field)


def test_a_deleted_run_takes_its_files_along(api):
    run = api.submit()["id"]
    home = api.directory(run).parent
    (home / "demo" / "report.json").write_text("{}")
    assert api.ann.delete(f"/v1/runs/{run}").status_code == 204
    assert not home.exists()
    assert home.parent.exists()
    assert api.ann.get(f"/v1/runs/{run}").status_code == 404


def test_the_files_of_a_deleted_run_may_be_kept(api):
    run = api.submit()["id"]
    home = api.directory(run).parent
    assert api.ann.delete(f"/v1/runs/{run}", params={"keep_artifacts": True}).status_code == 204
    assert home.exists()


def test_a_run_with_a_driver_is_not_deleted(api):
    run = api.submit()["id"]
    api.start(run)
    assert api.ann.delete(f"/v1/runs/{run}").status_code == 409
    assert states(api, run) == "running"


def test_a_run_is_not_deleted_while_another_may_still_start_from_it(api):
    first, corpus = run_with_text(api)
    second = api.submit(name="second", corpus=corpus)["id"]

    def refusal():
        answer = api.ann.delete(f"/v1/runs/{first}")
        return answer.json()["detail"] if answer.status_code == 409 else answer.status_code

    refused = f"run {second} starts from this run and has not succeeded; delete {second} first"
    for state in (RunState.STARTING, RunState.RUNNING, RunState.FAILED, RunState.QUEUED):
        assert refusal() == refused
        api.bring(second, state)
    api.bring(second, RunState.CANCELLED)
    assert refusal() == refused
    assert api.ann.delete(f"/v1/runs/{second}").status_code == 204
    assert refusal() == 204


def test_a_run_that_has_succeeded_needs_its_start_no_longer(api):
    first, corpus = run_with_text(api)
    second = api.submit(name="second", corpus=corpus)["id"]
    api.bring(second, RunState.STARTING, RunState.SUCCEEDED)
    assert api.ann.delete(f"/v1/runs/{first}").status_code == 204


def test_a_start_that_is_deleted_while_a_request_is_checked_is_refused(api):
    first, corpus = run_with_text(api)
    context, caller = api.app.state.context, Caller("ann", frozenset({"read", "submit"}), "token", None)
    policy = submission.policy_of(context, caller)
    task = Task("submission", json.dumps({"config": demo(corpus=corpus)}).encode(), policy, context.roots, here=True)
    run = asyncio.run(submission.planned(context, caller, task))
    assert api.ann.delete(f"/v1/runs/{first}").status_code == 204
    with pytest.raises(ConfigError, match=r"corpus\.sources\.0\.path: .*this run was deleted"):
        submission.store(context, caller, run, policy, key=None, body_hash=b"")
    assert api.ann.get("/v1/runs").json()["items"] == []


def test_an_administrator_finds_the_job_through_the_service_once_there_is_one(api):
    run = api.submit()["id"]
    assert api.admin.get(f"/v1/runs/{run}").json()["job_url"] is None
    api.start(run)
    assert api.admin.get(f"/v1/runs/{run}").json()["job_url"] == f"{api.settings.url}/ray/#/jobs/{run}-1"
    assert api.ann.get(f"/v1/runs/{run}").json()["job_url"] is None
    assert api.ann.get("/v1/runs").json()["items"][0]["job_url"] is None


def test_every_change_is_in_the_audit_log(api):
    run = api.submit()["id"]
    api.ann.patch(f"/v1/runs/{run}", json={"priority": 1})
    api.ann.post(f"/v1/runs/{run}/cancel")
    api.ann.post(f"/v1/runs/{run}/resume")
    retried = api.ann.post(f"/v1/runs/{run}/retry").json()["id"]
    api.ann.delete(f"/v1/runs/{run}")
    entries = api.admin.get("/v1/audit").json()["items"]
    assert [(entry["action"], entry["target"]) for entry in reversed(entries)] == [
        ("run.submit", run),
        ("run.change", run),
        ("run.cancel", run),
        ("run.resume", run),
        ("run.retry", retried),
        ("run.delete", run),
    ]
    assert {entry["owner"] for entry in entries} == {"ann"}
    assert all(entry["address"] for entry in entries)
