"""The client for asyncio programs; all requests to the service are defined here."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import JsonValue

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.run_record import RunReport
from service import schemas
from service.client import downloading, streams
from service.client.address import find_address
from service.client.datasets import Datasets
from service.client.downloading import Progress, no_progress
from service.client.http import DEFAULT, IDEMPOTENCY_KEY, NULL, Connection, Request, RetryPolicy, json_body, segment
from service.domain.reuse import Reuse
from service.domain.states import TERMINAL, RunState

T = TypeVar("T")

_PLANNING_SECONDS = 60.0
"""Maximum time for the answer to an estimate, in seconds: it may wait for an earlier one, and each may take 20 s."""

Configuration = RunConfig | Mapping[str, Any]
"""Configuration of a run: a validated `RunConfig`, or a mapping that the service validates."""


class AsyncClient(Datasets):
    """The service's API as coroutines. Each raises `ServiceProblem` or `ServiceAway` when it fails.

    GET requests, estimates and requests with an idempotency key are repeated while the service restarts or is
    overloaded; others are not.
    stamina logs each repetition; `stamina.instrumentation` changes that.

    Args:
        url: The service's URL; None uses MOEDISCO_URL or, if it is not set, the address that `moedisco serve` saved.
        token: The access token; None uses MOEDISCO_TOKEN or, if it is not set, the token that `moedisco serve` saved.
        retry: Policy for repeating failed requests.
        transport: Transport of httpx, for tests and special networks.

    Raises:
        UserError: The service's URL is not known.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        *,
        retry: RetryPolicy = DEFAULT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        address = find_address(url, token)
        self.url, self.state_dir = address.url, address.state_dir
        self._connection = Connection(address, retry, transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._connection.close()

    async def submit(
        self,
        config: Configuration,
        *,
        priority: int = 0,
        budget_dollars: float | Literal["none"] | None = None,
        project: str | None = None,
        idempotency_key: str | None = None,
    ) -> schemas.RunDetail:
        """Create a run.

        Args:
            config: The run's configuration, as `moedisco run` takes it.
            priority: Priority in the queue; runs with a higher priority start first.
            budget_dollars: Cost at which the run stops with a checkpoint; None and "none" mean no budget.
            project: Id or name of the project whose members may see the run; None means the caller's own.
            idempotency_key: Requests with the same key create only one run. None uses a new key for this call and its
                repetitions.
        """
        body = json_body(
            config=_plain(config), priority=priority, budget_dollars=_budget(budget_dollars), project=project
        )
        return await self._post(schemas.RunDetail, "/v1/runs", body, _key(idempotency_key))

    def runs(
        self,
        *,
        states: Sequence[RunState] = (),
        owner: str | None = None,
        project: str | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        created_after: float | None = None,
        created_before: float | None = None,
        where: Sequence[str] = (),
        order_by: str | None = None,
        page_size: int = 100,
    ) -> AsyncGenerator[schemas.Run]:
        """Runs in an order, by default newest first; each page is requested when it is needed.

        Args:
            states: States to include; empty for all.
            owner: Owner of the runs.
            project: Id or name of the runs' project.
            name: Part of the run's name.
            tags: Tags that the runs must all have.
            created_after: Earliest time of submission (seconds since the epoch).
            created_before: Time before which the runs were submitted (seconds since the epoch).
            where: Conditions on figures, such as `perplexity<30`.
            order_by: Field such as `perplexity`, or `-perplexity` for descending; runs without the figure come
                last. None means newest first.
            page_size: Maximum number of runs in one response.
        """
        asked = {
            "state": [state.value for state in states],
            "owner": owner,
            "project": project,
            "name": name,
            "tag": [f"{key}:{value}" for key, value in (tags or {}).items()],
            "created_after": created_after,
            "created_before": created_before,
            "where": list(where),
            "order_by": order_by,
        }
        return self._pages(schemas.RunPage, "/v1/runs", page_size, **asked)

    async def run(self, run_id: str) -> schemas.RunDetail:
        """The current state of a run."""
        return await self._get(schemas.RunDetail, _run_path(run_id))

    async def change(
        self,
        run_id: str,
        *,
        name: str | None = None,
        tags: Mapping[str, str | None] | None = None,
        priority: int | None = None,
        budget_dollars: float | Literal["none"] | None = None,
        kept: bool | None = None,
        note: str | None = None,
        project: str | None = None,
        if_version: int | None = None,
    ) -> schemas.RunDetail:
        """Change a run; None leaves a value as it is.

        Args:
            run_id: The run.
            name: The new name.
            tags: Tags to set; None removes one, and the others stay.
            priority: The new priority; it matters while the run is queued.
            budget_dollars: The new cost at which the run stops with a checkpoint; "none" removes the budget.
            kept: Whether retention spares the run.
            note: The new note; an empty text removes it.
            project: Id or name of the project to move the run to.
            if_version: `version` of the run as it was read. If the run has another one, nothing is changed.

        Raises:
            ServiceProblem: With the status 412, the run has another version than `if_version`.
        """
        body = json_body(
            name=name,
            tags=None if tags is None else dict(tags),
            priority=priority,
            budget_dollars=_budget(budget_dollars),
            kept=kept,
            note=note,
            project=project,
        )
        return await self._connection.ask(
            schemas.RunDetail, Request("PATCH", _run_path(run_id), headers=_match(if_version), body=body)
        )

    async def delete(self, run_id: str, *, keep_artifacts: bool = False, if_version: int | None = None) -> None:
        """Delete an ended run and its files; for `if_version` see `change`."""
        await self._connection.read(
            Request("DELETE", _run_path(run_id), {"keep_artifacts": keep_artifacts}, headers=_match(if_version))
        )

    async def cancel(self, run_id: str, *, force: bool = False, if_version: int | None = None) -> schemas.RunDetail:
        """Stop a run after a checkpoint; with `force`, within a minute and without one.

        For `if_version` see `change`.
        """
        return await self._post(
            schemas.RunDetail, _run_path(run_id, "cancel"), json_body(force=force), _match(if_version)
        )

    async def resume(self, run_id: str, *, if_version: int | None = None) -> schemas.RunDetail:
        """Queue a failed or cancelled run again; it continues from what it has stored.

        For `if_version` see `change`.
        """
        return await self._post(schemas.RunDetail, _run_path(run_id, "resume"), headers=_match(if_version))

    async def retry(
        self,
        run_id: str,
        changes: Mapping[str, JsonValue] | None = None,
        *,
        priority: int | None = None,
        budget_dollars: float | Literal["none"] | None = None,
        reuse: Reuse = "auto",
        idempotency_key: str | None = None,
    ) -> schemas.RunDetail:
        """Create a new run from an old run's configuration with changed settings, such as `{"tokens.total": 1000000}`.

        Priority and budget are the old run's if they are None; the budget "none" means no budget. `reuse` names the
        runs whose finished stages the new run takes where it would make them alike.
        """
        body = json_body(
            changes=dict(changes or {}), priority=priority, budget_dollars=_budget(budget_dollars), reuse=reuse
        )
        return await self._post(schemas.RunDetail, _run_path(run_id, "retry"), body, _key(idempotency_key))

    def events(
        self, run_id: str, after: int | None = None, *, follow: bool = True
    ) -> AsyncGenerator[tuple[int, Event]]:
        """A run's events with their positions, each once, in order, across restarts of the service.

        Args:
            run_id: The run.
            after: Position of the last event that the caller has seen; None starts with the first event.
            follow: Whether to wait for new events until the run ends; otherwise stop after the newest event.
        """
        return streams.events(self._connection, _run_path(run_id, "events"), after, follow)

    async def wait(self, run_id: str) -> schemas.RunDetail:
        """Wait until a run has ended; returns its final state."""
        while (run := await self.run(run_id)).state not in TERMINAL:
            async for _ in self.events(run_id, run.events - 1 if run.events else None):
                pass
        return run

    async def metrics(
        self, run_id: str, figure: schemas.Figure = "loss", *, units: Sequence[str] = (), points: int = 1000
    ) -> schemas.Metrics:
        """Curves of one training metric (`figure`) for the given units or all, with about `points` points each."""
        return await self._get(
            schemas.Metrics, _run_path(run_id, "metrics"), figure=figure, unit=list(units), points=points
        )

    async def units(self, run_id: str) -> list[schemas.Unit]:
        """Progress of the run's units: the seed, each sub-model and the fine-tune."""
        return (await self._get(schemas.UnitPage, _run_path(run_id, "submodels"))).items

    async def clusters(self, run_id: str) -> dict[str, Any]:
        """The report of the document clustering."""
        return await self._get(dict[str, Any], _run_path(run_id, "clusters"))

    async def report(self, run_id: str) -> RunReport:
        """The run's report; it is partial while the run is active."""
        return await self._get(RunReport, _run_path(run_id, "report"))

    async def compare(self, run_ids: Sequence[str]) -> schemas.Comparison:
        """What differs between two to five runs."""
        return await self._get(schemas.Comparison, "/v1/comparison", run=list(run_ids))

    async def logs(self, run_id: str) -> list[schemas.LogFile]:
        """The run's log files."""
        return (await self._get(schemas.LogPage, _run_path(run_id, "logs"))).items

    async def log(self, run_id: str, name: str = "driver", *, tail: int = 200) -> str:
        """The last lines of a log."""
        request = Request("GET", _run_path(run_id, "logs", name), {"tail": tail, "follow": False})
        return (await self._connection.read(request)).decode(errors="replace")

    def follow_log(self, run_id: str, name: str = "driver", *, tail: int = 200) -> AsyncGenerator[str]:
        """The last lines of a log, then new lines until the run ends. A lost connection raises `ServiceAway`."""
        return streams.log_lines(self._connection, _run_path(run_id, "logs", name), tail)

    async def artifacts(self, run_id: str) -> list[schemas.Artifact]:
        """The files of the run directory."""
        return (await self._get(schemas.ArtifactPage, _run_path(run_id, "artifacts"))).items

    async def fetch(self, run_id: str, path: str, target: Path, progress: Progress = no_progress) -> Path:
        """Download one file of the run directory; see `service.client.downloading.fetch`."""
        return await downloading.fetch(
            self._connection, f"{_run_path(run_id, 'artifacts')}/{quote(path)}", target, progress
        )

    async def download(self, run_id: str, directory: Path, progress: Progress = no_progress) -> Path:
        """Download the finished model into a new directory; see `service.client.downloading.download`."""
        return await downloading.download(self._connection, run_id, _run_path(run_id), directory, progress)

    async def estimate(self, config: Configuration) -> schemas.Estimate:
        """Resources that a run needs, and its cost at the operator's prices.

        The service computes one estimate of an owner at a time. One that a newer one displaces is asked for again.
        """
        body = json_body(config=_plain(config))
        return await self._connection.ask(
            schemas.Estimate,
            Request("POST", "/v1/estimates", body=body, silence=_PLANNING_SECONDS, changes_nothing=True),
        )

    async def estimate_retry(
        self, run_id: str, changes: Mapping[str, JsonValue] | None = None, *, reuse: Reuse = "auto"
    ) -> schemas.RetryEstimate:
        """Resources and cost of a retry, and which stages it takes from other runs; see `retry` and `estimate`."""
        path, body = _run_path(run_id, "retry", "estimate"), json_body(changes=dict(changes or {}), reuse=reuse)
        return await self._connection.ask(
            schemas.RetryEstimate, Request("POST", path, body=body, silence=_PLANNING_SECONDS, changes_nothing=True)
        )

    async def pools(self) -> schemas.PoolList:
        """The pools and their nodes."""
        return await self._get(schemas.PoolList, "/v1/pools")


def _run_path(run_id: str, *parts: str) -> str:
    """URL path of a run, followed by the given parts."""
    return "/".join(("/v1/runs", segment(run_id), *(segment(part) for part in parts)))


def _key(key: str | None) -> dict[str, str]:
    return {IDEMPOTENCY_KEY: key or uuid.uuid4().hex}


def _match(version: int | None) -> dict[str, str]:
    return {} if version is None else {"If-Match": f'"{version}"'}


def _budget(dollars: float | Literal["none"] | None) -> object:
    return NULL if dollars == "none" else dollars


def _plain(config: Configuration) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_unset=True) if isinstance(config, RunConfig) else dict(config)
