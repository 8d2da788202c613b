"""The client for programs that block: it runs the asynchronous client in a thread."""

from __future__ import annotations

import asyncio
import functools
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from service.client.asynchronous import AsyncClient
from service.client.http import DEFAULT, RetryPolicy

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._wait(method(self._asynchronous, *args, **kwargs))

    return call


def _iterated(
    method: Callable[Concatenate[AsyncClient, P], AsyncGenerator[T]],
) -> Callable[Concatenate[Client, P], Iterator[T]]:
    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        items = method(self._asynchronous, *args, **kwargs)
        self._open.add(items)

        async def following() -> T:
            return await anext(items)

        try:
            while True:
                try:
                    item = self._wait(following())
                except StopAsyncIteration:
                    break
                yield item
        except GeneratorExit:  # the caller stops early
            if not self._stop.alive:
                raise
            self._wait(items.aclose())
            self._open.discard(items)
            raise
        # `items` has ended, or (after an error such as Ctrl-C) is closed together with the client.
        self._open.discard(items)

    return call


async def _until_stopped(
    client: AsyncClient,
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]],
    open_items: set[AsyncGenerator[Any]],
) -> None:
    async with client:
        stopped = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), stopped))
        await stopped.wait()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        # Close each outer generator, which closes its inner ones; asyncio would close all of them concurrently, which
        # fails.
        for items in list(open_items):
            await items.aclose()


class Client:
    """The service's API as blocking calls. Each raises `ServiceProblem` or `ServiceAway` when it fails.

    It has the methods of `AsyncClient`, and repeats failed requests in the same way.

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
        self._asynchronous = AsyncClient(url, token, retry=retry, transport=transport)
        self.url, self.state_dir = self._asynchronous.url, self._asynchronous.state_dir
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._open: set[AsyncGenerator[Any]] = set()
        self._thread = threading.Thread(
            target=asyncio.run,
            args=(_until_stopped(self._asynchronous, started, self._open),),
            daemon=True,
            name="moedisco-client",
        )
        self._thread.start()
        self._loop, stopped = started.result()
        # Do not join the thread here: an unclosed client may be garbage-collected in that very thread.
        self._stop = weakref.finalize(self, self._loop.call_soon_threadsafe, stopped.set)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._stop()
        self._thread.join()

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # after Ctrl-C, also cancel the call in the other thread

    submit = _blocking(AsyncClient.submit)
    runs = _iterated(AsyncClient.runs)
    run = _blocking(AsyncClient.run)
    change = _blocking(AsyncClient.change)
    delete = _blocking(AsyncClient.delete)
    cancel = _blocking(AsyncClient.cancel)
    resume = _blocking(AsyncClient.resume)
    retry = _blocking(AsyncClient.retry)
    events = _iterated(AsyncClient.events)
    wait = _blocking(AsyncClient.wait)
    metrics = _blocking(AsyncClient.metrics)
    units = _blocking(AsyncClient.units)
    clusters = _blocking(AsyncClient.clusters)
    report = _blocking(AsyncClient.report)
    compare = _blocking(AsyncClient.compare)
    logs = _blocking(AsyncClient.logs)
    log = _blocking(AsyncClient.log)
    follow_log = _iterated(AsyncClient.follow_log)
    artifacts = _blocking(AsyncClient.artifacts)
    fetch = _blocking(AsyncClient.fetch)
    download = _blocking(AsyncClient.download)
    estimate = _blocking(AsyncClient.estimate)
    estimate_retry = _blocking(AsyncClient.estimate_retry)
    pools = _blocking(AsyncClient.pools)
    datasets = _iterated(AsyncClient.datasets)
    dataset = _blocking(AsyncClient.dataset)
    upload_dataset = _blocking(AsyncClient.upload_dataset)
    download_dataset = _blocking(AsyncClient.download_dataset)
    delete_dataset = _blocking(AsyncClient.delete_dataset)
    quota = _blocking(AsyncClient.quota)
    spending = _blocking(AsyncClient.spending)
    policies = _blocking(AsyncClient.policies)
    set_policies = _blocking(AsyncClient.set_policies)
    set_policy = _blocking(AsyncClient.set_policy)
    delete_policy = _blocking(AsyncClient.delete_policy)
    tokens = _iterated(AsyncClient.tokens)
    create_token = _blocking(AsyncClient.create_token)
    rotate_token = _blocking(AsyncClient.rotate_token)
    revoke_token = _blocking(AsyncClient.revoke_token)
    projects = _iterated(AsyncClient.projects)
    create_project = _blocking(AsyncClient.create_project)
    rename_project = _blocking(AsyncClient.rename_project)
    delete_project = _blocking(AsyncClient.delete_project)
    set_member = _blocking(AsyncClient.set_member)
    remove_member = _blocking(AsyncClient.remove_member)
    secrets = _blocking(AsyncClient.secrets)
    set_secret = _blocking(AsyncClient.set_secret)
    delete_secret = _blocking(AsyncClient.delete_secret)
    notice_url = _blocking(AsyncClient.notice_url)
    set_notice_url = _blocking(AsyncClient.set_notice_url)
    delete_notice_url = _blocking(AsyncClient.delete_notice_url)
    send_test_notice = _blocking(AsyncClient.send_test_notice)
    create_sign_in_code = _blocking(AsyncClient.create_sign_in_code)
    identity = _blocking(AsyncClient.identity)
