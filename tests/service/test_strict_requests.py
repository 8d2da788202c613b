"""What a request says counts as it is written: queries, the version that it is about, and the types of its values."""

from __future__ import annotations

from typing import Any

import pytest
from api_client import Service, demo

from moedisco_ray.core.config import load_config
from moedisco_ray.core.config.presets import preset_text

QUERIES = [
    ("/v1/runs?sate=failed", "sate", "state"),
    ("/v1/runs?page=2", "page", None),
    ("/v1/quota?user=bob", "user", None),
    ("/v1/audit?limits=1", "limits", "limit"),
    ("/v1/pools?name=low", "name", None),
    ("/v1/sessions?cursor=x", "cursor", None),
    ("/v1/runs/RUN?events=true", "events", None),
    ("/v1/runs/RUN/metrics?figur=loss", "figur", "figure"),
    ("/v1/runs/RUN/events?folow=false", "folow", "follow"),
    ("/healthz?x", "x", None),
]
CONVERTED: list[tuple[str, dict[str, Any], str]] = [
    ("priority", {"priority": "1"}, "a whole number, not text"),
    ("priority", {"priority": True}, "a whole number, not true or false"),
    ("priority", {"priority": 1.0}, "a whole number, not a number"),
    ("budget_dollars", {"budget_dollars": "20"}, "a number, not text"),
    ("config.seed", {"config": {"seed": "1"}}, "a whole number, not text"),
    ("config.seed", {"config": {"seed": 1.0}}, "a whole number, not a number"),
    (
        "config.corpus.sources.0.weight",
        {"config": {"corpus": {"sources": [{"path": "embedded", "weight": "1e-1"}]}}},
        "a number, not text",
    ),
    (
        "config.submodels.optimizer.compile",
        {"config": {"submodels": {"optimizer": {"compile": 1}}}},
        "true or false, not a whole",
    ),
]
"""Field of a run to submit, what it is set to, and the words of the refusal."""


def test_an_unknown_query_key_is_refused(api: Service) -> None:
    """A clean-up script that misspells `state` must not get, and delete, all runs.

    Before (af276e38): each path answered 200, and `/v1/runs?sate=failed` listed every run.
    """
    run = api.submit()["id"]
    for path, key, meant in QUERIES:
        answer = api.admin.get(path.replace("RUN", run))
        assert answer.status_code == 422, answer.text
        [mistake] = answer.json()["errors"]
        assert mistake["field"] == key
        assert ("did you mean" in mistake["message"]) == (meant is not None)
        assert meant is None or repr(meant) in mistake["message"]


def test_an_unknown_query_key_keeps_a_change_from_being_made(api: Service) -> None:
    """Before (af276e38): the run was cancelled, and deleted with its files although the key meant to keep them."""
    run = api.submit()["id"]
    assert api.ann.post(f"/v1/runs/{run}/cancel?dry_run=true").status_code == 422
    assert api.ann.get(f"/v1/runs/{run}").json()["state"] == "queued"
    api.ann.post(f"/v1/runs/{run}/cancel")
    assert api.ann.delete(f"/v1/runs/{run}?keep_artefacts=true").status_code == 422
    assert api.ann.get(f"/v1/runs/{run}").status_code == 200


CHANGES = [
    ("PATCH", "", {"priority": 3}),
    ("POST", "/cancel", None),
    ("DELETE", "", None),
    ("POST", "/retry", None),
    ("POST", "/resume", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_a_change_of_another_version_is_not_made(
    api: Service, method: str, path: str, body: dict[str, Any] | None
) -> None:
    """Before (af276e38): no answer had an ETag, and each change was made in spite of `If-Match`."""
    run = api.submit()["id"]
    seen = api.ann.get(f"/v1/runs/{run}").headers.get("etag", '"1"')
    api.ann.patch(f"/v1/runs/{run}", json={"priority": 1})  # by another client, meanwhile
    if path == "/resume" or method == "DELETE":
        api.ann.post(f"/v1/runs/{run}/cancel")
    before = api.ann.get(f"/v1/runs/{run}").json()
    refused = api.ann.request(method, f"/v1/runs/{run}{path}", json=body, headers={"If-Match": seen})
    assert refused.status_code == 412, refused.text
    assert "If-Match" in refused.json()["detail"]
    assert api.ann.get(f"/v1/runs/{run}").json() == before
    assert len(api.ann.get("/v1/runs").json()["items"]) == 1
    now = api.ann.get(f"/v1/runs/{run}").headers["etag"]
    made = api.ann.request(method, f"/v1/runs/{run}{path}", json=body, headers={"If-Match": f'"0", {now}'})
    assert made.is_success, made.text
    assert (method == "DELETE") or made.headers["etag"]


def test_a_tag_that_a_compressing_proxy_made_weak_names_its_version(api: Service) -> None:
    """nginx with `gzip` sends W/"1" for "1"; a client can only send back what it got.

    Before (af276e38): no answer had an ETag, and the change was made whatever `If-Match` said.
    """
    path = api.ann.post("/v1/runs", json={"config": demo()}).headers["location"]
    seen = f"W/{api.ann.get(path).headers.get('etag')}"
    assert api.ann.patch(path, json={"priority": 1}, headers={"If-Match": seen}).status_code == 200
    assert api.ann.patch(path, json={"priority": 2}, headers={"If-Match": seen}).status_code == 412
    assert api.ann.get(path).json()["priority"] == 1


def test_every_answer_with_one_run_has_the_version_of_that_run(api: Service) -> None:
    made = api.ann.post("/v1/runs", json={"config": demo()})
    path = made.headers["location"]
    assert made.headers["etag"] == api.ann.get(path).headers["etag"]
    changed = api.ann.patch(path, json={"name": "other"}, headers={"If-Match": made.headers["etag"]})
    assert changed.headers["etag"] == api.ann.get(path).headers["etag"] != made.headers["etag"]
    cancelled = api.ann.post(f"{path}/cancel", headers={"If-Match": "*"})
    assert cancelled.headers["etag"] == api.ann.get(path).headers["etag"] != changed.headers["etag"]


@pytest.mark.parametrize(("field", "changes", "words"), CONVERTED)
def test_a_value_of_another_type_is_not_converted(
    api: Service, field: str, changes: dict[str, Any], words: str
) -> None:
    """Before (af276e38): each run was created, with the value converted: priority 1 for true, weight 0.1 for "1e-1"."""
    body = {"config": demo()} | changes
    if "config" in changes:
        body = {"config": demo(**changes["config"])}
    answer = api.ann.post("/v1/runs", json=body)
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["errors"][0]["message"]
    assert field.rsplit(".", 1)[-1] in answer.json()["errors"][0]["field"]
    assert api.ann.get("/v1/runs").json()["items"] == []


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "/v1/runs/RUN", {"priority": "1"}),
        ("PATCH", "/v1/runs/RUN", {"kept": 1}),
        ("POST", "/v1/runs/RUN/cancel", {"force": 1}),
        ("POST", "/v1/runs/RUN/retry", {"priority": "1"}),
        ("POST", "/v1/runs/RUN/retry", {"changes": {"seed": "1"}}),
        ("PUT", "/v1/policies", {"default": {"queued_runs": "5"}}),
        ("PUT", "/v1/policies/owners/ann", {"retention": {"days": "1"}}),
        ("POST", "/v1/tokens", {"name": "x", "owner": "x", "scopes": ["read"], "expires_in_days": "1"}),
    ],
)
def test_other_requests_are_not_converted_either(api: Service, method: str, path: str, body: dict[str, Any]) -> None:
    """Before (af276e38): each request was carried out."""
    answer = api.admin.request(method, path.replace("RUN", api.submit()["id"]), json=body)
    assert answer.status_code == 422, answer.text
    assert "must be" in answer.json()["errors"][0]["message"]


def test_whole_numbers_are_numbers(api: Service) -> None:
    assert api.ann.post("/v1/runs", json={"config": demo(), "budget_dollars": 5}).status_code == 201


@pytest.mark.parametrize("name", ["demo", "default", "paper"])
def test_what_the_command_line_reads_from_yaml_has_the_types_of_the_schema(
    api: Service, tmp_path: Any, name: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(preset_text(name))
    sent = load_config(file, ["corpus.sources=[{path: embedded}]"], for_service=True).model_dump(
        mode="json", exclude_unset=True
    )
    sent.pop("output", None)
    answer = api.ann.post("/v1/estimates", json={"config": sent})
    assert answer.status_code == 200, answer.text
