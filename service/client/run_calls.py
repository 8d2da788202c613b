"""Calls about runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from pydantic import JsonValue

from moedisco_ray.core.config import RunConfig
from service.client.calls import IDEMPOTENCY_KEY, Answer, Call, body, query, segment
from service.client.parsing import document, items, nothing, plain, text
from service.domain.states import RunState
from service.schemas import (
    Artifact,
    ArtifactPage,
    Figure,
    LogFile,
    Metrics,
    RunDetail,
    RunPage,
    Training,
    Unit,
)

Configuration = RunConfig | Mapping[str, Any]
"""Checked, or plain data that the service checks."""

_STREAM = (("Accept-Encoding", "identity"), ("Connection", "close"))
"""A stream has a connection of its own: one that is used again leads back to a service that is about to end."""


def submit(config: Configuration, priority: int, budget_dollars: float | None, idempotency_key: str) -> Call[RunDetail]:
    """POST /v1/runs; the key makes it safe to send again."""
    return Call(
        "POST", "/v1/runs", document(RunDetail), headers=((IDEMPOTENCY_KEY, idempotency_key),),
        content=body(config=plain_config(config), priority=priority, budget_dollars=budget_dollars))


def page(
    states: Sequence[RunState], owner: str | None, name: str | None, tags: Mapping[str, str], cursor: str | None, limit: int,
) -> Call[RunPage]:
    """GET /v1/runs."""
    return Call("GET", "/v1/runs", document(RunPage), query(
        state=[state.value for state in states], owner=owner, name=name, tag=[f"{key}:{value}" for key, value in tags.items()],
        cursor=cursor, limit=limit))


def run(run_id: str) -> Call[RunDetail]:
    """GET /v1/runs/{id}."""
    return Call("GET", _path(run_id), document(RunDetail))


def change(
    run_id: str, name: str | None, tags: Mapping[str, str] | None, priority: int | None, budget_dollars: float | None,
    kept: bool | None,
) -> Call[RunDetail]:
    """PATCH /v1/runs/{id}."""
    return Call("PATCH", _path(run_id), document(RunDetail), content=body(
        name=name, tags=None if tags is None else dict(tags), priority=priority, budget_dollars=budget_dollars, kept=kept))


def delete(run_id: str, keep_artifacts: bool) -> Call[None]:
    """DELETE /v1/runs/{id}."""
    return Call("DELETE", _path(run_id), nothing, query(keep_artifacts=keep_artifacts))


def cancel(run_id: str, force: bool) -> Call[RunDetail]:
    """POST /v1/runs/{id}/cancel."""
    return Call("POST", _path(run_id, "cancel"), document(RunDetail), content=body(force=force))


def resume(run_id: str) -> Call[RunDetail]:
    """POST /v1/runs/{id}/resume."""
    return Call("POST", _path(run_id, "resume"), document(RunDetail))


def retry(
    run_id: str, changes: Mapping[str, JsonValue], priority: int | None, budget_dollars: float | None, idempotency_key: str,
) -> Call[RunDetail]:
    """POST /v1/runs/{id}/retry; the key makes it safe to send again."""
    return Call(
        "POST", _path(run_id, "retry"), document(RunDetail), headers=((IDEMPOTENCY_KEY, idempotency_key),),
        content=body(changes=dict(changes), priority=priority, budget_dollars=budget_dollars))


def events(run_id: str, after: int | None, follow: bool) -> Call[None]:
    """GET /v1/runs/{id}/events, from behind a position."""
    seen = () if after is None else (("Last-Event-ID", str(after)),)
    return Call(
        "GET", _path(run_id, "events"), nothing, query(follow=follow),
        headers=(("Accept", "text/event-stream"), *_STREAM, *seen),
        silence=45.0)  # the service pings every 15 s


def metrics(run_id: str, figure: Figure, units: Sequence[str], points: int) -> Call[Metrics]:
    """GET /v1/runs/{id}/metrics."""
    return Call("GET", _path(run_id, "metrics"), document(Metrics), query(figure=figure, unit=list(units), points=points))


def units(run_id: str) -> Call[list[Unit]]:
    """GET /v1/runs/{id}/submodels."""
    return Call("GET", _path(run_id, "submodels"), items(Unit))


def trainings(run_id: str) -> Call[list[Training]]:
    """GET /v1/runs/{id}/trainings."""
    return Call("GET", _path(run_id, "trainings"), items(Training))


def clusters(run_id: str) -> Call[dict[str, Any]]:
    """GET /v1/runs/{id}/clusters."""
    return Call("GET", _path(run_id, "clusters"), plain)


def report(run_id: str) -> Call[dict[str, Any]]:
    """GET /v1/runs/{id}/report."""
    return Call("GET", _path(run_id, "report"), plain)


def logs(run_id: str) -> Call[list[LogFile]]:
    """GET /v1/runs/{id}/logs."""
    return Call("GET", _path(run_id, "logs"), items(LogFile))


def log(run_id: str, name: str, tail: int, follow: bool) -> Call[str]:
    """GET /v1/runs/{id}/logs/{name}."""
    return Call(
        "GET", _path(run_id, "logs", name), text, query(tail=tail, follow=follow),
        headers=_STREAM if follow else (),
        silence=None if follow else 30.0)  # a log may be silent for as long as a step takes


def artifacts(run_id: str) -> Call[list[Artifact]]:
    """GET /v1/runs/{id}/artifacts."""
    return Call("GET", _path(run_id, "artifacts"), _artifacts)


def artifact(run_id: str, path: str, start: int, version: str | None) -> Call[None]:
    """GET /v1/runs/{id}/artifacts/{path}: what follows `start` bytes, of the file's `version` (ETag) only."""
    headers = [("Accept-Encoding", "identity")]
    if start:
        headers.append(("Range", f"bytes={start}-"))
    if start and version is not None:
        headers.append(("If-Range", version))
    return Call("GET", f"{_path(run_id, 'artifacts')}/{quote(path)}", nothing, headers=tuple(headers))


def model_archive(run_id: str, start: int = 0, version: str | None = None) -> Call[None]:
    """GET /v1/runs/{id}/model.tar, from a byte on if the archive is still the one of this ETag."""
    rest = (("Range", f"bytes={start}-"), ("If-Range", version)) if start and version else ()
    return Call("GET", _path(run_id, "model.tar"), nothing, headers=(("Accept-Encoding", "identity"), *rest))


def plain_config(config: Configuration) -> dict[str, Any]:
    """A configuration as JSON has it; what was not set is left to the service's defaults."""
    return config.model_dump(mode="json", exclude_unset=True) if isinstance(config, RunConfig) else dict(config)


def _artifacts(answer: Answer) -> list[Artifact]:
    return document(ArtifactPage)(answer).items


def _path(run_id: str, *parts: str) -> str:
    return "/".join(("/v1/runs", segment(run_id), *(segment(part) for part in parts)))
