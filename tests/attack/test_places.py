"""No setting that names a place leads a tenant out of what the operator allows."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from api_client import Service, demo, service
from hostile_places import CREDENTIALS, SECRET, cases, configuration
from hub_standin import hub
from starlette.testclient import TestClient

FIELDS = sorted({field for field, _, _ in cases()})
WHOLE = ("corpus.sources.0.path", "checkpoint.storage")
"""A setting that is read and one that is written: all places are tried there, and each fourth place elsewhere."""


def refused(answer, field: str) -> str:
    """The one mistake of an answer, which names the setting and says more than that."""
    assert 400 <= answer.status_code < 500, (field, answer.status_code, answer.text)
    mistakes = answer.json()["errors"]
    assert len(mistakes) == 1
    assert mistakes[0]["field"] in (f"config.{field}", f"changes.{field}"), answer.text
    message: str = mistakes[0]["message"]
    assert "; " in message or " must " in message or "leave" in message, f"no remedy: {message}"
    return message


def stored(api: Service) -> list[Path]:
    assert api.admin.get("/v1/runs").json()["items"] == []
    return [
        path
        for folder in ("runs", "checkpoints")
        for path in (api.settings.state_dir.parent / folder).iterdir()
        if not path.is_symlink()
    ]


@pytest.mark.parametrize("field", FIELDS)
def test_hostile_places_are_refused_by_every_endpoint_that_takes_a_configuration(
    api: Service, tenant: TestClient, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of each six places, one is also sent to the second endpoint, which makes the same check."""
    caplog.set_level(logging.DEBUG)
    tried = [case[1:] for case in cases() if case[0] == field]
    tried = tried if field in WHOLE else tried[FIELDS.index(field) % 4 :: 4]
    asked = [("/v1/runs", *case) for case in tried] + [("/v1/estimates", *case) for case in tried[::6]]
    for path, kind, value in asked:
        answer = tenant.post(path, json={"config": configuration(field, value)})
        if "\0" in value:  # JSON with NUL is refused before settings are validated
            assert answer.status_code == 422
            continue
        message = refused(answer, field)
        assert "TOP SECRET" not in answer.text, kind
        assert SECRET not in answer.text, (kind, answer.text)
        assert kind not in CREDENTIALS or "instance role" in message, (kind, message)
    assert not stored(api)
    assert SECRET not in caplog.text


@pytest.mark.parametrize("field", FIELDS)
def test_a_retry_cannot_bring_a_hostile_place(api: Service, tenant: TestClient, field: str) -> None:
    run = api.submit()
    for value in ("../x", f"s3://AKIA:{SECRET}@texts/wiki"):
        config = configuration(field, value)
        changes = {
            section: config[section]
            for section in config
            if config[section] != demo().get(section) and section != "name"
        }
        answer = tenant.post(f"/v1/runs/{run['id']}/retry", json={"changes": changes})
        refused(answer, field)
        assert SECRET not in answer.text
    assert len(api.admin.get("/v1/runs").json()["items"]) == 1


def test_checkpoints_stay_in_run_directories_unless_the_operator_names_a_root(tmp_path: Path) -> None:
    with service(tmp_path) as api:
        for storage in ("/etc/cron.d", "../../x", "s3://any/x?endpoint_override=evil", "s3://any/x", "ck"):
            answer = api.ann.post("/v1/runs", json={"config": demo(checkpoint={"storage": storage})})
            assert "--storage-root" in refused(answer, "checkpoint.storage")
        assert api.admin.get("/v1/runs").json()["items"] == []


@pytest.mark.parametrize(
    ("storage", "stored_as"),
    [
        ("s3://checkpoints/moe", None),
        ("s3://checkpoints/moe/team?region=eu-west-1", None),
        ("team", "checkpoints/team"),
    ],
)
def test_checkpoints_go_to_a_root_that_the_operator_names(
    api: Service, tenant: TestClient, storage: str, stored_as: str | None
) -> None:
    answer = tenant.post("/v1/runs", json={"config": demo(checkpoint={"storage": storage})})
    assert answer.status_code == 201, answer.text
    expected = storage if stored_as is None else str(api.settings.state_dir.parent / stored_as)
    assert answer.json()["config"]["checkpoint"]["storage"] == expected
    assert json.dumps(expected) in json.dumps(api.admin.get(f"/v1/runs/{answer.json()['id']}").json())


@pytest.mark.slow
def test_a_model_of_the_hub_is_read_only_under_a_root_that_the_operator_names(
    api: Service, tenant: TestClient, tmp_path: Path
) -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    files = {
        "config.json": json.dumps({"model_type": "llama", **sizes}).encode(),
        "tokenizer.json": b'{"model": {"vocab": {}}}',
    }
    with hub(tmp_path / "hub-cache") as server:
        commit = server.add("allowed/model", files)
        server.add("other/model", files)
        for path in ("/v1/runs", "/v1/estimates"):
            answer = tenant.post(path, json={"config": demo(model={"init": {"upcycle": "hf://other/model"}})})
            assert "--input-root" in refused(answer, "model.init.upcycle")
            answer = tenant.post(
                path, json={"config": demo(model={"init": {"upcycle": "hf://allowed/model", "revision": "../x"}})}
            )
            assert "must" in refused(answer, "model.init.revision")
            answer = tenant.post(path, json={"config": demo(tokenizer={"path": "hf://allowed/model"})})
            refused(answer, "tokenizer.path")
        assert not server.requests, "a refused name is not looked up"
        answer = tenant.post("/v1/runs", json={"config": demo(model={"init": {"upcycle": "hf://allowed/model"}})})
        assert answer.status_code == 201, answer.text
        init = answer.json()["config"]["model"]["init"]
        assert (init["upcycle"], init.get("commit")) == ("hf://allowed/model", None), (
            "the driver finds the commit when it starts"
        )
        assert {path.split("/resolve/")[-1].split("/")[0] for _, path, _ in server.requests if "/resolve/" in path} == {
            commit
        }


def test_code_runs_only_if_the_operator_names_the_function(tmp_path: Path) -> None:
    def asking(function: str) -> dict[str, object]:
        return {"sources": [{"path": "embedded", "map": function}]}

    with service(tmp_path, map_functions=("clean:keep",)) as api:
        for function in ("subprocess:run", "os:system", "clean:run", "clean.keep:keep"):
            for path in ("/v1/runs", "/v1/estimates"):
                assert "--map-function" in refused(
                    api.ann.post(path, json={"config": demo(corpus=asking(function))}), ("corpus.sources.0.map")
                )
        assert api.admin.get("/v1/runs").json()["items"] == []
        answer = api.ann.post("/v1/runs", json={"config": demo(corpus=asking("clean:keep"))})
        assert answer.status_code == 201, "the service itself does not import the function"
        changes = {"corpus": asking("subprocess:run")}
        refused(
            api.ann.post(f"/v1/runs/{answer.json()['id']}/retry", json={"changes": changes}), "corpus.sources.0.map"
        )


def test_checkpoints_never_go_to_the_hub(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="the scheme hf:// is not supported"),
        service(tmp_path, storage_roots=("hf://allowed",)),
    ):
        pass
