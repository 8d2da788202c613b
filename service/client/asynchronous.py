"""The client for programs that do other things meanwhile; method for method the one of `service.client.sync`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import JsonValue

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.events import Event
from service.client import carrying, downloading, operation_calls, run_calls
from service.client.address import find_address
from service.client.asking import ask
from service.client.calls import Answer, Call, Dialogue, Send
from service.client.downloading import Progress, no_progress
from service.client.following import EventFollower, LogFollower
from service.client.patience import DEFAULT, Patience
from service.client.run_calls import Configuration
from service.domain.policies import Policies, Policy
from service.domain.states import TERMINAL, RunState
from service.schemas import (
    Artifact,
    DeliveryInfo,
    Estimate,
    Figure,
    Identity,
    LogFile,
    Metrics,
    NewSignInCode,
    NewToken,
    NewWebhook,
    PoolList,
    Quota,
    Run,
    RunDetail,
    Scope,
    TokenInfo,
    Training,
    Unit,
    WebhookInfo,
)

T = TypeVar("T")


class AsyncClient:
    """The service, as coroutines. Every one may raise `ServiceProblem` or `ServiceAway`.

    GETs, and what carries an idempotency key, are sent again while the service is away or overloaded; nothing else is.

    Args:
        url: Of the service; left out: MOEDISCO_URL, or what `moedisco serve` wrote.
        token: Left out: MOEDISCO_TOKEN, or what `moedisco serve` wrote.
        patience: How long the service may be away.
        transport: Carries the requests; for tests and unusual networks.

    Raises:
        UserError: Nothing says where the service is.
    """

    def __init__(
        self, url: str | None = None, token: str | None = None, *, patience: Patience = DEFAULT,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        address = find_address(url, token)
        self.url = address.url
        self._patience = patience
        self._http = httpx.AsyncClient(base_url=address.url, headers=carrying.headers(address), transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def submit(
        self, config: Configuration, *, priority: int = 0, budget_dollars: float | None = None, idempotency_key: str | None = None,
    ) -> RunDetail:
        """Make a run.

        Args:
            config: As `moedisco run` takes it.
            priority: Higher goes first.
            budget_dollars: The run is stopped, with a checkpoint, when it has cost this much.
            idempotency_key: Requests with the same key make one run; left out: a new key for this call and its repetitions.
        """
        return await self._ask(run_calls.submit(config, priority, budget_dollars, idempotency_key or carrying.new_key()))

    async def runs(
        self, *, states: Sequence[RunState] = (), owner: str | None = None, name: str | None = None,
        tags: Mapping[str, str] | None = None, page_size: int = 100,
    ) -> AsyncIterator[Run]:
        """Runs, newest first; pages are asked for as they are needed."""
        cursor: str | None = None
        while True:
            page = await self._ask(run_calls.page(states, owner, name, tags or {}, cursor, page_size))
            for run in page.items:
                yield run
            cursor = page.next_cursor
            if cursor is None:
                return

    async def run(self, run_id: str) -> RunDetail:
        """A run as it stands."""
        return await self._ask(run_calls.run(run_id))

    async def change(
        self, run_id: str, *, name: str | None = None, tags: Mapping[str, str] | None = None, priority: int | None = None,
        budget_dollars: float | None = None, kept: bool | None = None,
    ) -> RunDetail:
        """Change what may change; what is left out stays. A kept run is not removed by retention."""
        return await self._ask(run_calls.change(run_id, name, tags, priority, budget_dollars, kept))

    async def delete(self, run_id: str, *, keep_artifacts: bool = False) -> None:
        """Delete a run that has ended, and its files unless they are to be kept."""
        await self._ask(run_calls.delete(run_id, keep_artifacts))

    async def cancel(self, run_id: str, *, force: bool = False) -> RunDetail:
        """End a run; with a checkpoint unless by force."""
        return await self._ask(run_calls.cancel(run_id, force))

    async def resume(self, run_id: str) -> RunDetail:
        """Queue a failed or cancelled run again; it goes on from its last checkpoint."""
        return await self._ask(run_calls.resume(run_id))

    async def retry(
        self, run_id: str, changes: Mapping[str, JsonValue] | None = None, *, priority: int | None = None,
        budget_dollars: float | None = None, idempotency_key: str | None = None,
    ) -> RunDetail:
        """Make a new run of an old one's configuration, with changed settings (`{"tokens.total": 1000000}`)."""
        key = idempotency_key or carrying.new_key()
        return await self._ask(run_calls.retry(run_id, changes or {}, priority, budget_dollars, key))

    async def events(self, run_id: str, after: int | None = None, *, follow: bool = True) -> AsyncIterator[tuple[int, Event]]:
        """A run's events with their positions, each once, in order, across restarts of the service.

        Args:
            run_id: The run.
            after: Position of the last event already seen; None: from the start.
            follow: Go on until the run ends; else stop at the newest event.
        """
        follower = EventFollower(run_id, after, follow, self._patience, self.url)
        while not follower.done:
            await asyncio.sleep(follower.pause)
            try:
                async with self._open(follower.call) as response:
                    if follower.opened(await _head(response)):
                        async for chunk in response.aiter_bytes():
                            for item in follower.take(chunk):
                                yield item
                            if follower.done:
                                return
                        follower.closed()
            except httpx.TransportError as error:
                follower.lost(error)

    async def wait(self, run_id: str) -> RunDetail:
        """Wait until a run has ended; the run as it then stands."""
        while (run := await self.run(run_id)).state not in TERMINAL:
            async for _ in self.events(run_id, run.events - 1 if run.events else None):
                pass
        return run

    async def metrics(self, run_id: str, figure: Figure = "loss", *, units: Sequence[str] = (), points: int = 1000) -> Metrics:
        """Curves of one figure, of all units or of some, down-sampled to about `points` points each."""
        return await self._ask(run_calls.metrics(run_id, figure, units, points))

    async def units(self, run_id: str) -> list[Unit]:
        """The seed, the sub-models and the fine-tune."""
        return await self._ask(run_calls.units(run_id))

    async def trainings(self, run_id: str) -> list[Training]:
        """Each training of a run as Ray Train sees it: state, attempts, workers."""
        return await self._ask(run_calls.trainings(run_id))

    async def clusters(self, run_id: str) -> dict[str, Any]:
        """The clustering's own report."""
        return await self._ask(run_calls.clusters(run_id))

    async def report(self, run_id: str) -> dict[str, Any]:
        """The run's report; while it runs, so far."""
        return await self._ask(run_calls.report(run_id))

    async def logs(self, run_id: str) -> list[LogFile]:
        """The logs there are."""
        return await self._ask(run_calls.logs(run_id))

    async def log(self, run_id: str, name: str = "driver", *, tail: int = 200) -> str:
        """The last lines of a log."""
        return await self._ask(run_calls.log(run_id, name, tail, follow=False))

    async def follow_log(self, run_id: str, name: str = "driver", *, tail: int = 200) -> AsyncIterator[str]:
        """The last lines of a log and those that are added until the run ends; a lost connection ends it with `ServiceAway`."""
        follower = LogFollower(run_id, name, tail, self._patience, self.url)
        while not follower.done:
            await asyncio.sleep(follower.pause)
            try:
                async with self._open(follower.call) as response:
                    if follower.opened(await _head(response)):
                        async for chunk in response.aiter_bytes():
                            for item in follower.take(chunk):
                                yield item
                        for item in follower.closed():
                            yield item
            except httpx.TransportError as error:
                follower.lost(error)

    async def artifacts(self, run_id: str) -> list[Artifact]:
        """The files of the run directory."""
        return await self._ask(run_calls.artifacts(run_id))

    async def fetch(self, run_id: str, path: str, target: Path, progress: Progress = no_progress) -> Path:
        """Bring one file of the run directory; see `service.client.downloading.fetch`."""
        return await self._carry_out(downloading.fetch(run_id, path, target, progress, self._patience, self.url))

    async def download(self, run_id: str, directory: Path, progress: Progress = no_progress) -> Path:
        """Bring the finished model into a new directory; see `service.client.downloading.download`."""
        return await self._carry_out(downloading.download(run_id, directory, progress, self._patience, self.url))

    async def estimate(self, config: Configuration) -> Estimate:
        """What a run would need, and cost at the operator's prices."""
        return await self._ask(operation_calls.estimate(config))

    async def pools(self) -> PoolList:
        """The machines of every pool."""
        return await self._ask(operation_calls.pools())

    async def quota(self, owner: str | None = None) -> Quota:
        """Limits of the caller's owner and what is used of them; an administrator may name another owner."""
        return await self._ask(operation_calls.quota(owner))

    async def policies(self) -> Policies:
        """The policy of every owner."""
        return await self._ask(operation_calls.policies())

    async def set_policies(self, policies: Policies) -> None:
        """Replace all policies."""
        await self._ask(operation_calls.set_policies(policies))

    async def set_policy(self, owner: str, policy: Policy) -> None:
        """Replace one owner's entry; what it leaves out is as in the default."""
        await self._ask(operation_calls.set_policy(owner, policy))

    async def delete_policy(self, owner: str) -> None:
        """Delete one owner's entry, so that the default holds."""
        await self._ask(operation_calls.delete_policy(owner))

    async def tokens(self) -> list[TokenInfo]:
        """All tokens, without themselves."""
        return (await self._ask(operation_calls.tokens())).items

    async def create_token(self, name: str, owner: str, scopes: Sequence[Scope], expires_in_days: float | None = 90) -> NewToken:
        """Make a token, which is shown this once; None days: it does not expire."""
        return await self._ask(operation_calls.create_token(name, owner, scopes, expires_in_days))

    async def revoke_token(self, token_id: str) -> None:
        """Make a token invalid."""
        await self._ask(operation_calls.revoke_token(token_id))

    async def create_sign_in_code(self) -> NewSignInCode:
        """Make a code that signs one browser in with this client's token, within ten minutes."""
        return await self._ask(operation_calls.create_sign_in_code())

    async def webhooks(self) -> list[WebhookInfo]:
        """Who is told of state changes."""
        return (await self._ask(operation_calls.webhooks())).items

    async def create_webhook(self, url: str, states: Sequence[RunState] = ()) -> NewWebhook:
        """Have state changes told to a URL; the secret that signs them is shown this once."""
        return await self._ask(operation_calls.create_webhook(url, states))

    async def delete_webhook(self, webhook_id: str) -> None:
        """Tell it no more."""
        await self._ask(operation_calls.delete_webhook(webhook_id))

    async def deliveries(self, webhook_id: str) -> list[DeliveryInfo]:
        """What a webhook was told lately."""
        return (await self._ask(operation_calls.deliveries(webhook_id))).items

    async def identity(self) -> Identity:
        """Who asks, and what answers."""
        return await self._ask(operation_calls.identity())

    async def _ask(self, call: Call[T]) -> T:
        return await self._carry_out(ask(call, self._patience, self.url))

    async def _carry_out(self, dialogue: Dialogue[T]) -> T:
        with contextlib.closing(dialogue):
            try:
                step = next(dialogue)
                while True:
                    try:
                        answer = await self._send(step)
                    except (httpx.TransportError, MoeDiscoError) as error:
                        step = dialogue.throw(error)
                    else:
                        step = dialogue.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result

    async def _send(self, step: Send) -> Answer:
        await asyncio.sleep(step.pause)
        async with self._open(step.call) as response:
            if step.sink is None or response.status_code not in carrying.CONTENT:
                return await _head(response, whole=True)
            head = await _head(response)
            take = step.sink(head)
            async for chunk in response.aiter_bytes():
                await asyncio.to_thread(take, chunk)  # it may write to a disk
            return head

    def _open(self, call: Call[Any]) -> contextlib.AbstractAsyncContextManager[httpx.Response]:
        return self._http.stream(**carrying.request(call))


async def _head(response: httpx.Response, *, whole: bool = False) -> Answer:
    if whole or response.status_code not in carrying.CONTENT:
        await response.aread()
        return carrying.answer(response, response.content)
    return carrying.answer(response)
