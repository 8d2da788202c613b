"""The service opens the state of an earlier version: shows runs, ends those that cannot continue, starts others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_client import Service, service
from frozen_state import RUNS, put_state
from reconciling import FINISH, Scene
from running_service import Running
from typer.testing import CliRunner

from moedisco_ray.cli.app import app as training
from moedisco_ray.core.records.events import Event
from service.cli import app
from service.domain.jobs import submission_id

SENTENCE = "recorded by an earlier version, cannot be shown in full"
ACTIVE = ("running", "stopping", "starting")


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Service]:
    put_state("a624334", tmp_path)
    with service(tmp_path) as made:
        yield made


def beside(old: Service, tmp_path: Path) -> Scene:
    """The background side of the same service, whose Ray still runs the drivers of the active runs."""
    scene = Scene(old.database, tmp_path, old.settings, old.jobs, old.pools)
    for state in ACTIVE:
        old.jobs.runs(submission_id(RUNS[state], 1))
    scene.now += 1_000_000
    return scene


@pytest.mark.parametrize("state", RUNS)
def test_every_page_of_an_earlier_run_opens(old: Service, state: str):
    """Name, state and dollars are shown, with one sentence on what is missing.

    Before (af276e38): GET of all but the queued and starting runs answers 500 (KeyError: 'work'; TypeError:
    Hold.__init__() ...).
    """
    about = f"/v1/runs/{RUNS[state]}"
    shown = old.admin.get(about)
    assert shown.status_code == 200
    run = shown.json()
    assert (run["state"], run["money"]["dollars"] > 0) == (state, state in ("succeeded", "running"))
    assert run["bill"]["dollars"] == run["money"]["dollars"]
    pages = ["report", "submodels", "metrics", "logs", "artifacts", "events?follow=false"]
    assert {page: old.admin.get(f"{about}/{page}").status_code for page in pages} == dict.fromkeys(pages, 200)
    assert old.admin.get(f"{about}/report").json()["bill"]["dollars"] == run["money"]["dollars"]
    assert run.get("notice") == SENTENCE
    assert [each.get("notice") for each in old.admin.get("/v1/runs").json()["items"] if each["id"] == run["id"]] == [
        SENTENCE
    ]


def test_earlier_runs_are_found_by_their_tags(old: Service):
    found = old.admin.get("/v1/runs", params={"tag": "team:vision"}).json()["items"]
    assert {run["id"] for run in found} == {RUNS["succeeded"], RUNS["starting"], RUNS["queued"]}


@pytest.mark.parametrize("state", [*ACTIVE, "queued"])
def test_an_earlier_run_is_cancelled_and_its_driver_stops(old: Service, tmp_path: Path, state: str):
    """Before (af276e38): `cancel` of a running or stopping run answers 500 (TypeError); a starting one stays so."""
    scene = beside(old, tmp_path)
    assert old.admin.post(f"/v1/runs/{RUNS[state]}/cancel").status_code == 202
    scene.now = old.admin.get(f"/v1/runs/{RUNS[state]}").json()["updated"]
    scene.round(30)
    assert scene.run(RUNS[state]).state == "cancelled"
    assert old.admin.post(f"/v1/runs/{RUNS[state]}/cancel").status_code == 202
    assert not [name for name in old.jobs.jobs if name.startswith(RUNS[state]) and not old.jobs.jobs[name].phase.ended]


def test_earlier_runs_hold_up_no_new_run(old: Service, tmp_path: Path):
    """A new run starts, is metered and ends, and the operator reads what is wrong.

    Before (af276e38): `/readyz` says ok, and the new run waits: "owner ann has 3 of 2 runs active".
    """
    scene = beside(old, tmp_path)
    new = old.submit("ann")["id"]
    scene.round()
    ready = old.anonymous.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert "cannot be processed" in ready.json()["checks"]["runs"]
    assert "moedisco_troubled_runs 3.0" in old.anonymous.get("/metrics").text
    assert scene.run(RUNS["queued"]).state == "failed"
    scene.round(30)
    assert {state: scene.run(RUNS[state]).state for state in ACTIVE} == dict.fromkeys(ACTIVE, "cancelled")
    assert scene.run(RUNS["running"]).reason.startswith(SENTENCE)
    scene.begins(new)
    scene.report(new, FINISH)
    scene.jobs.ends(scene.job(new))
    scene.round(2)
    assert scene.run(new).state == "succeeded"
    assert old.anonymous.get("/readyz").json()["status"] == "ok"
    assert "moedisco_troubled_runs 0.0" in old.anonymous.get("/metrics").text


def test_a_new_run_starts_after_ray_has_lost_the_drivers_of_earlier_runs(old: Service, tmp_path: Path):
    """Before (af276e38): each round raises TypeError: Hold.__init__() misses the required argument 'stage'."""
    scene = Scene(old.database, tmp_path, old.settings, old.jobs, old.pools)
    scene.leave(RUNS["running"], Event("heartbeat"))
    new = old.submit("ann")["id"]
    scene.round(3)
    assert scene.run(new).state == "starting"
    assert {state: scene.run(RUNS[state]).state for state in ACTIVE} == dict.fromkeys(ACTIVE, "cancelled")


def test_an_earlier_run_is_retried_with_its_configuration(old: Service):
    """Before (af276e38): the resumption answers 500 (KeyError: 'work')."""
    again = old.admin.post(f"/v1/runs/{RUNS['failed']}/retry")
    assert again.status_code == 201, again.text
    assert old.admin.post(f"/v1/runs/{RUNS['failed']}/resume").status_code == 409


def test_an_earlier_run_is_deleted_with_its_files(old: Service, tmp_path: Path):
    assert old.admin.delete(f"/v1/runs/{RUNS['succeeded']}").status_code == 204
    assert not (tmp_path / "runs" / RUNS["succeeded"]).exists()


def test_commands_say_what_cannot_be_shown_of_an_earlier_run(old: Service, tmp_path: Path):
    """Before (af276e38): `status`, and `watch` at the end, print that the service failed, exit 1; `list` is silent."""
    behind = Running(old)
    behind.start()
    try:
        environment = {"MOEDISCO_URL": behind.url, "MOEDISCO_TOKEN": old.plain["admin"], "COLUMNS": "200"}
        printed = {
            command: CliRunner().invoke(app, [command, *arguments], env=environment).output
            for command, arguments in {"list": [], "status": [RUNS["running"]], "watch": [RUNS["succeeded"]]}.items()
        }
    finally:
        behind.stop()
    assert {command: SENTENCE in " ".join(text.split()) for command, text in printed.items()} == dict.fromkeys(
        printed, True
    )


def test_an_earlier_run_directory_is_refused_in_one_line(tmp_path: Path):
    put_state("a624334", tmp_path)
    directory = tmp_path / "runs" / RUNS["succeeded"] / "succeeded"
    shown = CliRunner().invoke(training, ["show", str(directory)])
    assert shown.output.count("\n") == 1
    assert "holds a run of another version" in shown.output
    assert shown.exit_code == 2
