"""Secrets reach the driver of a run that names them, and no other place."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_client import Service, service
from reconciling import SECRET, Scene

from moedisco_ray.cli import driver_secrets
from moedisco_ray.cli.driver_secrets import receive_secrets
from moedisco_ray.core.driver_proofs import ReportAddress
from moedisco_ray.core.errors import ConfigError, RunError, RunStopped
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.sealed import seal, unseal
from service.api.context import ServiceContext
from service.backups import back_up
from service.bootstrap import secrets_key
from service.domain.states import RunState
from service.ray_side.jobs import entrypoint

VALUE, OWN = "hf_very-secret-1", "wandb_very-secret-2"
NAMES = ["HF_TOKEN", "WANDB_API_KEY"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A project of ann's with one secret, and one of her own."""
    with service(tmp_path_factory.mktemp("secrets")) as made:
        made.ann.post("/v1/projects", json={"name": "law"})
        for project, name, value in (("law", "HF_TOKEN", VALUE), ("ann", "WANDB_API_KEY", OWN)):
            answer = made.ann.put(f"/v1/projects/{project}/secrets/{name}", json={"value": value})
            assert (answer.status_code, answer.json()["set_by"]) == (200, "ann"), answer.text
        yield made


@pytest.fixture
def through(api: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a driver, whose requests get to the application; its environment is restored at the end."""

    def post(url: str, content: bytes, headers: dict[str, str], **_: object) -> httpx.Response:
        return api.anonymous.post(url, content=content, headers=headers)

    monkeypatch.setattr(driver_secrets.httpx, "post", post)
    for name in NAMES:
        monkeypatch.setenv(name, "")
    return tmp_path / "report-to-1"


def submitted(api: Service, names: list[str] = NAMES, project: str = "law") -> str:
    config = {"name": "demo", "corpus": {"sources": [{"path": "embedded"}]}, "secrets": names}
    answer = api.ann.post("/v1/runs", json={"config": config, "project": project})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def address(api: Service, run: str, attempt: int = 1) -> ReportAddress:
    known = api.address(run, attempt)
    return ReportAddress(known.url, attempt, known.key, tuple(NAMES))


def test_only_the_driver_of_a_run_gets_its_secrets(
    api: Service, through: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    run = submitted(api)
    scene = Scene(api.database, tmp_path, api.settings, api.jobs)
    scene.round()
    submission = api.jobs.submissions[f"{run}-1"]
    written = submission.report_to.read_text()
    assert ReportAddress.from_json(written).secrets == tuple(NAMES)
    through.write_text(address(api, run).to_json())
    receive_secrets(through)
    assert [os.environ[name] for name in NAMES] == [VALUE, OWN]
    api.report(run, Event("run_started", data={"name": "demo"}))
    database = Path(api.settings.database.removeprefix("sqlite:///"))
    back_up(api.settings.database, database.parent, tmp_path / "backup.tar.gz")
    with contextlib.closing(sqlite3.connect(database)) as opened:
        dump = "\n".join(opened.iterdump())
    answers = [
        api.admin.get(path).text
        for path in (
            *(f"/v1/runs/{run}", f"/v1/runs/{run}/events?follow=false", f"/v1/runs/{run}/report", "/v1/audit"),
            *("/v1/projects", "/v1/projects/law/secrets", "/v1/projects/ann/secrets"),
        )
    ]
    assert [each["name"] for each in json.loads(answers[5])["items"]] == ["HF_TOKEN"]
    places = {
        "job": repr(submission) + entrypoint(submission) + written + submission.config_path.read_text(),
        "dump": dump,
        "database": database.read_bytes().decode("latin-1"),
        "backup": gzip.decompress((tmp_path / "backup.tar.gz").read_bytes()).decode("latin-1"),
        "log": caplog.text,
        "answers": "".join(answers),
    }
    assert not [place for place, text in places.items() if VALUE in text or OWN in text]


def test_what_a_driver_says_does_not_give_the_secrets_away(api: Service) -> None:
    known = address(api, run := submitted(api))
    api.start(run)
    answer = api.drive(known, {"first": 0, "events": [], "secrets": True})
    assert VALUE not in answer.text
    with pytest.raises(ValueError):
        unseal(known.key, "secrets in the answer to another", answer.json()["secrets"])
    assert "secrets" not in api.drive(known, {"first": 0, "events": []}).json()


def test_a_run_has_the_secrets_of_its_project_and_of_its_owner_alone(api: Service) -> None:
    for who, names, project in (("ann", ["MLFLOW_TRACKING_TOKEN"], "law"), ("bob", NAMES, "bob")):
        config = {"name": "demo", "corpus": {"sources": [{"path": "embedded"}]}, "secrets": names}
        answer = api.client(who).post("/v1/runs", json={"config": config, "project": project if who == "ann" else None})
        assert answer.status_code == 422
        assert answer.json()["errors"][0]["field"] == "config.secrets", answer.text
        assert "moedisco secrets set" in answer.text
    config = {"name": "demo", "corpus": {"sources": [{"path": "embedded"}]}, "secrets": ["LD_PRELOAD"]}
    assert api.ann.post("/v1/runs", json={"config": config}).status_code == 422


def test_a_driver_ends_with_the_reason_if_it_cannot_have_its_secrets(
    api: Service, through: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submitted(api, project="ann", names=["WANDB_API_KEY"])
    api.start(run)
    through.write_text(address(api, run).to_json())
    context: ServiceContext = api.app.state.context
    monkeypatch.setitem(api.app.state._state, "context", _with_key(context, b"another key of thirty-two bytes."))
    with pytest.raises(ConfigError, match="was set under another --secrets-key-file; set it again"):
        receive_secrets(through)
    monkeypatch.setitem(api.app.state._state, "context", context)
    assert api.ann.delete("/v1/projects/ann/secrets/WANDB_API_KEY").status_code == 204
    with pytest.raises(ConfigError, match="has it; set it first"):
        receive_secrets(through)
    assert api.ann.put("/v1/projects/ann/secrets/WANDB_API_KEY", json={"value": OWN}).status_code == 200
    api.bring(run, RunState.STOPPING, RunState.CANCELLED)
    with pytest.raises(RunStopped, match="superseded"):
        receive_secrets(through)
    monkeypatch.setattr(driver_secrets, "PATIENCE", 0.0)
    monkeypatch.setattr(driver_secrets, "_PAUSE", 0.0)
    through.write_text(ReportAddress("http://127.0.0.1:1/v1", 1, b"k" * 32, ("HF_TOKEN",)).to_json())
    with pytest.raises(RunError, match="did not give the run's secrets"):
        receive_secrets(through)


@pytest.mark.parametrize("value", ["", "x" * 5000, "very-secret\0", 7])
def test_a_value_that_cannot_be_stored_is_not_quoted(api: Service, value: object) -> None:
    answer = api.ann.put("/v1/projects/ann/secrets/A_TOKEN", json={"value": value})
    assert (answer.status_code, "secret\\0" in answer.text) == (422, False), answer.text


def test_the_key_is_made_once_and_in_no_database(tmp_path: Path) -> None:
    path = tmp_path / "state" / "secrets-key"
    assert secrets_key(path) == secrets_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("short")
    with pytest.raises(ConfigError, match="is too short"):
        secrets_key(path)
    sealed = seal(SECRET, "here", "text")
    assert unseal(SECRET, "here", sealed) == "text"
    for key, place, changed in ((b"x" * 32, "here", sealed), (SECRET, "there", sealed), (SECRET, "here", sealed[:-8])):
        with pytest.raises(ValueError):
            unseal(key, place, changed)


def _with_key(context: ServiceContext, key: bytes) -> ServiceContext:
    return dataclasses.replace(context, secrets_key=key)
