"""Who may do what: every operation of the service by an owner, editor, viewer, stranger and administrator."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from api_client import Service, demo
from page_runs import finish
from page_server import Site

from moedisco_ray.core.config import check_config
from service.api.security import Caller, still_allowed
from service.database import projects, quotas, reuse, runs, tokens
from service.database.ids import new_id
from service.domain.access import ROLES, Action, check_access, roles_for
from service.domain.run_paths import with_run_directory
from service.domain.states import RunState
from service.errors import Forbidden, NotFound

PEOPLE = ("ann", "ed", "vi", "bob", "admin")
"""The project's owner, its editor, its viewer, a stranger, an administrator."""
ABSENT = "0" * 26
PROJECT = "law"


@dataclasses.dataclass(frozen=True)
class Row:
    """An operation, what it needs, and the status that it then has.

    Attributes:
        fresh: State of a new run that each person gets; None for the finished run.
        stranger: Status for a stranger.
    """

    action: Action
    method: str
    path: str
    status: int = 200
    body: Any = None
    fresh: RunState | None = None
    stranger: int = 404

    def expected(self, who: str) -> int:
        if who == "bob":
            return self.stranger
        allowed = {"see": PEOPLE, "edit": ("ann", "ed", "admin"), "manage": ("ann", "admin")}[self.action]
        return self.status if who in allowed else 403


RUN = "/v1/runs/{run}"
MEMBER = "/v1/projects/{project}/members/new"
DATASET = "/v1/datasets/{dataset}"
TEXT = {"name": "wiki", "files": [{"path": "a.txt", "bytes": 4, "sha256": hashlib.sha256(b"text").hexdigest()}]}
SECRETS = "/v1/projects/{project}/secrets"
NOTICES = "/v1/projects/{project}/notices"
START = {"config": demo(tokenizer={"path": "run://{run}/model"})}
ROWS: dict[str, Row] = {
    "submit_run": Row("edit", "POST", "/v1/runs", 201, {"config": demo(), "project": "{project}"}),
    "list_runs": Row("see", "GET", "/v1/runs?project={project}&owner=ann&name=demo&where=dollars>=0", stranger=200),
    "get_run": Row("see", "GET", RUN),
    "change_run": Row("edit", "PATCH", RUN, body={"note": "x"}),
    "delete_run": Row("edit", "DELETE", RUN, 204, fresh=RunState.CANCELLED),
    "cancel_run": Row("edit", "POST", f"{RUN}/cancel", 202, fresh=RunState.QUEUED),
    "resume_run": Row("edit", "POST", f"{RUN}/resume", 202, fresh=RunState.CANCELLED),
    "retry_run": Row("edit", "POST", f"{RUN}/retry", 201, {}),
    "estimate_retry": Row("see", "POST", f"{RUN}/retry/estimate", body={}),
    "estimate": Row("see", "POST", "/v1/estimates", body=START, stranger=422),
    "stream_events": Row("see", "GET", f"{RUN}/events?follow=false"),
    "get_metrics": Row("see", "GET", f"{RUN}/metrics"),
    "list_submodels": Row("see", "GET", f"{RUN}/submodels"),
    "get_clusters": Row("see", "GET", f"{RUN}/clusters"),
    "get_report": Row("see", "GET", f"{RUN}/report"),
    "list_logs": Row("see", "GET", f"{RUN}/logs"),
    "get_log": Row("see", "GET", f"{RUN}/logs/driver"),
    "list_artifacts": Row("see", "GET", f"{RUN}/artifacts"),
    "get_artifact": Row("see", "GET", f"{RUN}/artifacts/clusters/report.json"),
    "head_artifact": Row("see", "HEAD", f"{RUN}/artifacts/clusters/report.json"),
    "get_model_archive": Row("see", "GET", f"{RUN}/model.tar"),
    "head_model_archive": Row("see", "HEAD", f"{RUN}/model.tar"),
    "compare_runs": Row("see", "GET", "/v1/comparison?run={run}&run={other}"),
    "create_dataset": Row("edit", "POST", "/v1/datasets", body={"project": "{project}", **TEXT}),
    "list_datasets": Row("see", "GET", "/v1/datasets?name=wiki", stranger=200),
    "get_dataset": Row("see", "GET", DATASET),
    "get_dataset_file": Row("see", "GET", f"{DATASET}/files/a.txt"),
    "head_dataset_file": Row("see", "HEAD", f"{DATASET}/files/a.txt"),
    "delete_dataset": Row("edit", "DELETE", DATASET, 204),
    "list_projects": Row("see", "GET", "/v1/projects", stranger=200),
    "rename_project": Row("manage", "PATCH", "/v1/projects/{project}", body={"name": PROJECT}),
    "delete_project": Row("manage", "DELETE", "/v1/projects/{project}", 409),  # it has runs
    "put_member": Row("manage", "PUT", MEMBER, body={"role": "viewer"}),
    "remove_member": Row("manage", "DELETE", MEMBER, 204),
    "list_secrets": Row("see", "GET", SECRETS),
    "set_secret": Row("edit", "PUT", f"{SECRETS}/HF_TOKEN", body={"value": "hf_1"}),
    "set_notice_url": Row("edit", "PUT", NOTICES, body={"url": "https://localhost/x"}),
    "get_notice_url": Row("see", "GET", NOTICES),
    "send_test_notice": Row("edit", "POST", f"{NOTICES}/test", 409),  # no address of the Internet
    "delete_notice_url": Row("edit", "DELETE", NOTICES, 204),
    "delete_secret": Row("edit", "DELETE", f"{SECRETS}/HF_TOKEN", 204),
}
WITHOUT = {
    *("static", "openapi", "page", "reference", "ray_root", "ray_page", "healthz", "readyz", "get_figures"),
    *("sign_in", "sign_out", "list_sessions", "end_sessions", "create_sign_in_code", "get_identity"),
    *("list_tokens", "create_token", "rotate_token", "revoke_token", "list_audit"),
    *("get_policies", "set_policies", "set_policy", "delete_policy", "get_quota", "get_spending"),
    *("list_pools", "get_preset", "get_schema"),
    "create_project",  # everyone who may submit has own ones
    "put_blob",  # of the caller alone, until a data set has it
    "report_events",  # from drivers, whose keys are of one run
}
"""Operations without a run or a project of another person."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A service with a project of ann's, and in it a finished run and a queued one."""

    api: Service
    project: str
    run: str
    other: str

    def new(self, state: RunState, owner: str = "ann") -> str:
        """A run in the project, without the time that planning takes."""
        run_id = new_id()
        config = check_config(demo(output=str(self.api.settings.output_roots[0])), for_service=True)
        with self.api.database.write() as session:
            row = runs.insert(
                session,
                run_id=run_id,
                config=with_run_directory(config, run_id),
                owner=owner,
                priority=0,
                budget_dollars=None,
                estimate={},
                parent=None,
                now=time.time(),
                project=self.project,
            )
            if state is not RunState.QUEUED:
                runs.transition(session, row, state, reason=None, now=time.time())
        return run_id

    def asked(self, row: Row, who: str, run: str, other: str, project: str, dataset: str = ABSENT) -> Any:
        def filled(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: filled(each) for key, each in value.items()}
            names = {"run": run, "other": other, "project": project, "dataset": dataset}
            return value.format(**names) if isinstance(value, str) else value

        return self.api.client(who).request(row.method, filled(row.path), json=filled(row.body))

    def dataset(self) -> str:
        """A data set of ann's in the project, the same as before unless it was deleted."""
        return str(self.api.upload("wiki", {"a.txt": b"text"}, project=self.project)["id"])


@pytest.fixture(scope="module")
def place(shared: Service) -> Place:
    with shared.database.write() as session:
        for who in ("ed", "vi"):
            shared.plain[who], _ = tokens.create(
                session, name=who, owner=who, scopes=["submit"], expires=None, now=time.time()
            )
    site = Site.__new__(Site)  # what is behind a page, without a port
    site.service = shared
    made = shared.ann.post("/v1/projects", json={"name": PROJECT})
    assert made.status_code == 201, made.text
    project = made.json()["id"]
    for who, role in (("ed", "editor"), ("vi", "viewer")):
        member = shared.ann.put(f"/v1/projects/{PROJECT}/members/{who}", json={"role": role})
        assert member.status_code == 200, member.text
    run = finish(site)
    (shared.directory(run) / "model" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 299}}}')
    moved = shared.ann.patch(f"/v1/runs/{run}", json={"project": PROJECT}).json()
    assert moved["project"] == {"id": project, "name": PROJECT, "owner": "ann", "role": "owner"}
    place = Place(shared, project, run, "")
    return dataclasses.replace(place, other=place.new(RunState.QUEUED))


def test_every_operation_has_a_row(place: Place) -> None:
    assert set(_names(place.api.app.routes)) == ROWS.keys() | WITHOUT
    assert not ROWS.keys() & WITHOUT


@pytest.mark.parametrize("operation", ROWS)
def test_a_role_decides_what_a_person_may_do(place: Place, operation: str) -> None:
    row = ROWS[operation]
    for who in reversed(PEOPLE):  # the owner last, who may do all
        run = place.run if row.fresh is None else place.new(row.fresh)
        before = {
            "remove_member": "put_member",
            "delete_secret": "set_secret",
            "delete_notice_url": "set_notice_url",
        }.get(operation)
        if before is not None:
            place.asked(ROWS[before], "ann", run, place.other, place.project)
        dataset = place.dataset() if "dataset" in operation else ABSENT
        answer = place.asked(row, who, run, place.other, place.project, dataset)
        assert answer.status_code == row.expected(who), (who, answer.text)
        if who == "bob" and row.method != "HEAD":
            absent = place.asked(row, who, ABSENT, "1" * 26, ABSENT)
            assert absent.status_code == answer.status_code
            if row.stranger == 200:
                assert place.project not in answer.text
            else:
                assert answer.json()["detail"].replace(run, ABSENT) == absent.json()["detail"]


def test_lists_have_what_a_person_may_see(place: Place) -> None:
    for who in PEOPLE:
        client = place.api.client(who)
        listed = {run["id"]: run["project"] for run in client.get("/v1/runs?limit=200").json()["items"]}
        mine = {each["name"]: each["role"] for each in client.get("/v1/projects").json()["items"]}
        assert (place.run in listed) == (PROJECT in mine) == (who != "bob")
        assert {"ed", "ann"} & mine.keys() == {"ed": {"ed"}, "ann": {"ann"}, "admin": {"ed", "ann"}}.get(who, set())
        if who != "bob":
            role = {"ed": "editor", "vi": "viewer"}.get(who, "owner")
            assert listed[place.run]["role"] == mine[PROJECT] == role


def test_a_retry_stays_in_the_project_and_takes_stages_that_its_members_may_see(place: Place) -> None:
    made = place.api.client("ed").post(f"/v1/runs/{place.run}/retry", json={"reuse": "never"}).json()
    assert (made["owner"], made["project"]["id"]) == ("ed", place.project)
    secret, private = place.api.submit("bob")["id"], place.api.submit("ed")["id"]
    for run_id in (secret, private, place.run):
        with place.api.database.write() as session:
            row = runs.lock(session, run_id)
            runs.amend(session, row, now=time.time(), state="failed", attempt=1)
    with place.api.database.write() as session:
        for parent, seen in ((made["id"], {place.run}), (secret, {secret}), (private, {private, place.run})):
            found = {run.id for run in reuse.candidates(session, runs.get(session, parent))}
            assert found & {secret, private, place.run} == seen
        reuse.offer(session, made["id"], [secret, place.run])
        reuse.take(session, made["id"], {"corpus": 0, "cluster": 1}, time.time())
        runs.amend(session, runs.lock(session, place.run), now=time.time(), state="succeeded")
    shown = place.api.client("vi").get(f"/v1/runs/{made['id']}").json()["reuses"]
    assert [each["run"] for each in shown] == [place.run]
    with place.api.database.write() as session:
        runs.delete(session, runs.lock(session, secret))
    for who, count in (("vi", 1), ("admin", 2)):
        assert len(place.api.client(who).get(f"/v1/runs/{made['id']}").json()["reuses"]) == count


def test_the_id_of_a_run_that_prevents_a_deletion_is_shown_to_those_who_may_see_it(place: Place) -> None:
    start = {"config": demo(tokenizer={"path": f"run://{place.run}/model"})}
    reader = place.api.client("vi").post("/v1/runs", json=start)
    assert reader.status_code == 201, reader.text
    for who, named in (("ann", False), ("admin", True)):
        answer = place.api.client(who).delete(f"/v1/runs/{place.run}")
        assert answer.status_code == 409
        assert (reader.json()["id"] in answer.json()["detail"]) is named
    assert place.api.client("vi").delete(f"/v1/runs/{reader.json()['id']}").status_code == 204


def test_who_leaves_loses_the_runs_also_by_key_and_open_streams(place: Place) -> None:
    api, key = place.api, {"Idempotency-Key": "mine"}
    asked = {"config": demo(), "project": PROJECT}
    api.ann.put(f"/v1/projects/{PROJECT}/members/bob", json={"role": "editor"})
    run = api.bob.post("/v1/runs", json=asked, headers=key).json()["id"]
    assert api.ann.post("/v1/runs", json=asked, headers=key).json()["id"] != run  # a key belongs to its person
    caller = Caller("bob", frozenset({"read"}), _token(api, "bob"), None)
    assert still_allowed(caller, api_context(api), run)
    assert api.bob.delete(f"/v1/projects/{PROJECT}/members/vi").status_code == 403
    assert api.bob.delete(f"/v1/projects/{PROJECT}/members/bob").status_code == 204
    assert not still_allowed(caller, api_context(api), run)
    assert api.bob.get(f"/v1/runs/{run}").status_code == 404
    assert api.bob.post("/v1/runs", json=asked, headers=key).status_code == 409
    assert api.bob.post(f"/v1/runs/{run}/cancel").status_code == 404


def test_a_run_moves_only_between_projects_that_the_person_may_edit(place: Place) -> None:
    run = place.new(RunState.QUEUED)
    for who, project, status in (
        ("ed", "ann", 404),
        ("vi", "vi", 403),
        ("bob", "bob", 404),
        ("ed", "ed", 403),
        ("admin", "ed", 200),
    ):
        answer = place.api.client(who).patch(f"/v1/runs/{run}", json={"project": project})
        assert answer.status_code == status, (who, answer.text)
    assert place.api.client("ed").get(f"/v1/runs/{run}").json()["project"]["name"] == "ed"
    assert place.api.ann.get(f"/v1/runs/{run}").status_code == 404


def test_names_of_projects_mean_what_the_caller_owns(place: Place) -> None:
    api = place.api
    assert api.ann.post("/v1/projects", json={"name": PROJECT}).status_code == 409
    assert api.ann.post("/v1/projects", json={"name": place.project}).status_code == 422
    theirs = api.bob.post("/v1/projects", json={"name": PROJECT}).json()
    api.bob.put(f"/v1/projects/{PROJECT}/members/ed", json={"role": "editor"})
    api.bob.put(f"/v1/projects/{PROJECT}/members/ann", json={"role": "editor"})
    assert api.ann.put(f"/v1/projects/{PROJECT}/members/x", json={"role": "viewer"}).json()["id"] == place.project
    unclear = api.client("ed").post("/v1/runs", json={"config": demo(), "project": PROJECT})
    assert (unclear.status_code, "choose one by its id" in unclear.json()["detail"]) == (409, True)
    assert api.ann.put(f"/v1/projects/{PROJECT}/members/ann", json={"role": "viewer"}).status_code == 409
    assert api.ann.delete(f"/v1/projects/{PROJECT}/members/nobody").status_code == 404
    assert api.ann.get(f"/v1/runs?project={theirs['id']}").json()["items"] == []


def test_a_project_is_renamed_and_deleted_once_it_is_empty(place: Place) -> None:
    api = place.api
    made = api.ann.post("/v1/projects", json={"name": "draft"}).json()
    assert api.ann.patch("/v1/projects/draft", json={"name": PROJECT}).status_code == 409
    assert api.ann.patch("/v1/projects/draft", json={"name": "ann"}).status_code == 409
    own = api.ann.patch("/v1/projects/ann", json={"name": "mine"})
    assert (own.status_code, "keeps its name" in own.json()["detail"]) == (409, True)
    assert api.ann.patch("/v1/projects/draft", json={"name": "final"}).json()["id"] == made["id"]
    api.ann.put("/v1/projects/final/members/vi", json={"role": "viewer"})
    api.ann.put("/v1/projects/final/secrets/HF_TOKEN", json={"value": "hf_1"})
    run = place.new(RunState.QUEUED)
    assert api.ann.patch(f"/v1/runs/{run}", json={"project": "final"}).status_code == 200
    refused = api.ann.delete("/v1/projects/final")
    assert (refused.status_code, "has 1 runs; delete them" in refused.json()["detail"]) == (409, True)
    api.ann.patch(f"/v1/runs/{run}", json={"project": PROJECT})
    dataset = api.upload("wiki", {"a.txt": b"text"}, project="final")
    refused = api.ann.delete("/v1/projects/final")
    assert (refused.status_code, "has 1 data sets; delete them" in refused.json()["detail"]) == (409, True)
    assert api.ann.delete(f"/v1/datasets/{dataset['id']}").status_code == 204
    assert api.ann.delete("/v1/projects/final").status_code == 204
    assert api.client("vi").get("/v1/projects/final/secrets").status_code == 404
    assert "final" not in [each["name"] for each in api.ann.get("/v1/projects").json()["items"]]


def test_everyone_sees_the_spending_of_own_runs_and_projects(place: Place) -> None:
    then = 1_600_000_000.0
    with place.api.database.write() as session:
        own = projects.default_of(session, "bob", then).id
        for owner, project, dollars in (("ed", place.project, 2.0), ("ann", place.project, 1.0), ("bob", own, 4.0)):
            for month in (then, then - 40 * 86_400):
                quotas.add_dollars(session, owner, project, dollars, month)
    for who, expected in {"ann": 3.0, "ed": 3.0, "vi": 3.0, "bob": 4.0, "admin": 7.0}.items():
        found = place.api.client(who).get("/v1/spending?group_by=project&month=2020-09").json()["items"]
        assert sum(each["dollars"] for each in found) == expected
        assert {each["month"] for each in found} == {None}
        names = {each["project_name"] for each in found}
        assert names == {"bob": {"bob"}, "admin": {"bob", PROJECT}}.get(who, {PROJECT})
    by_owner = place.api.ann.get("/v1/spending?group_by=month,owner").json()["items"][-4:]
    assert [(each["month"], each["owner"], each["dollars"]) for each in by_owner] == [
        ("2020-09", "ann", 1.0),
        ("2020-09", "ed", 2.0),
        ("2020-08", "ann", 1.0),
        ("2020-08", "ed", 2.0),
    ]
    assert place.api.ann.get("/v1/spending?group_by=owner,tag").status_code == 422


def test_the_held_out_loss_of_the_parent_is_shown_to_those_who_may_see_it(place: Place) -> None:
    child = place.api.client("ed").post(f"/v1/runs/{place.run}/retry", json={"reuse": "never"}).json()["id"]

    def loss(who: str, of_parent_in: str) -> float | None:
        with place.api.database.write() as session:
            parent = runs.lock(session, place.run)
            runs.amend(session, parent, now=time.time(), held_out_loss=3.45, project=of_parent_in)
        return place.api.client(who).get(f"/v1/runs/{child}").json()["parent_held_out_loss"]

    with place.api.database.write() as session:
        anns = projects.default_of(session, "ann", 0).id
    assert [loss("ed", anns), loss("admin", anns), loss("ed", place.project)] == [None, 3.45, 3.45]


def test_a_role_may_do_what_those_before_it_may() -> None:
    assert [len(roles_for(action)) for action in ("see", "edit", "manage")] == [3, 2, 1]
    for action in ("see", "edit", "manage"):
        with pytest.raises(NotFound):
            check_access(None, action, "run")
        for role in ROLES:
            if role in roles_for(action):
                check_access(role, action, "run")
            else:
                with pytest.raises(Forbidden):
                    check_access(role, action, "run")


def _names(routes: Iterable[Any]) -> Iterator[str]:
    """Names of routes, also of those in routers."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        yield from [route.name] if inner is None else _names(inner.routes)


def _token(api: Service, name: str) -> str:
    return next(each["id"] for each in api.admin.get("/v1/tokens").json()["items"] if each["name"] == name)


def api_context(api: Service) -> Any:
    return api.app.state.context
