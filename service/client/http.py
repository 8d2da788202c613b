"""Sends requests, repeats them after temporary failures, and reads streams that survive a lost connection."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Literal, TypedDict, TypeVar
from urllib.parse import quote

import httpx
import stamina
from pydantic import TypeAdapter

from service.client.address import Address
from service.client.errors import ServiceAway, ServiceProblem, problem_in
from service.schemas import Problem

T = TypeVar("T")

IDEMPOTENCY_KEY = "Idempotency-Key"
PASSING = frozenset({429, 502, 503, 504})
"""HTTP statuses of temporary failures, after which a request is repeated."""
NULL = object()
"""The value of a field that a request sends as null."""
_CONNECT_SECONDS = 10.0
"""Timeout for opening a connection, in seconds."""
STABLE_SECONDS = 1.0
"""Age in seconds at which a connection counts as working even without an item: a stream without events has only
pings."""


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """Policy for repeating a request while the service restarts, is overloaded or cannot be reached.

    Attributes:
        seconds: Time during which a failing request is repeated, in seconds; 0 disables repetitions.
        first_wait: Wait after the first failure, in seconds; it doubles with each further failure.
        longest_wait: Maximum wait between two attempts, in seconds, unless the service asks for a longer wait.
    """

    seconds: float = 60.0
    first_wait: float = 0.25
    longest_wait: float = 10.0


DEFAULT = RetryPolicy()


@dataclasses.dataclass(frozen=True)
class Request:
    """A request to the service.

    Attributes:
        path: Path below the service's URL, percent-encoded.
        params: Query parameters; parameters with the value None are left out.
        body: JSON text, unless a header names another type.
        silence: Maximum time in which no byte of the response arrives, in seconds; None sets no limit.
        expected: HTTP statuses, in addition to 2xx, that are not raised as errors.
        changes_nothing: Whether a request other than GET has no effect on the service, so that it may be repeated.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes | None = None
    silence: float | None = 30.0
    expected: frozenset[int] = frozenset()
    changes_nothing: bool = False

    @property
    def repeatable(self) -> bool:
        """Whether the request is idempotent, so that it may be repeated."""
        return self.method == "GET" or self.changes_nothing or IDEMPOTENCY_KEY in self.headers


class _Retries(TypedDict):
    """Arguments for the retry functions of stamina."""

    attempts: int | None
    timeout: float | None
    wait_initial: float
    wait_max: float
    wait_jitter: float


class Connection:
    """Sends requests to one service.

    Args:
        retry: Policy for repeating failed requests.
        transport: Transport of httpx; None uses the network.
    """

    def __init__(self, address: Address, retry: RetryPolicy, transport: httpx.AsyncBaseTransport | None) -> None:
        self._url = address.url
        self._retry = retry
        headers = {"Authorization": f"Bearer {address.token}"} if address.token else {}
        self._http = httpx.AsyncClient(base_url=address.url, headers=headers, transport=transport)

    async def close(self) -> None:
        await self._http.aclose()

    async def ask(self, result: type[T], request: Request) -> T:
        """Send a request and parse the JSON response. Fields that a newer service adds are ignored.

        Raises:
            ServiceProblem: The service answers with an error, or another program answers.
            ServiceAway: The service cannot be reached.
        """
        body = await self.read(request)
        try:
            return TypeAdapter(result).validate_json(body, extra="ignore")
        except ValueError as error:
            raise ServiceProblem(
                Problem(
                    type="about:blank",
                    title="Unreadable answer",
                    status=200,
                    detail=f"the answer to {request.method} {request.path} is not understood; is MOEDISCO_URL that of "
                    "a MoeDisco service, and as new as this client?",
                )
            ) from error

    async def read(self, request: Request) -> bytes:
        """Send a request, and repeat it if that is safe; returns the body of the response.

        Raises:
            ServiceProblem: The service answers with an error.
            ServiceAway: The service cannot be reached.
        """

        async def once() -> bytes:
            async with self._open(request) as response:
                return await response.aread()

        if not request.repeatable:
            return await once()
        return await self.repeated(once)

    async def repeated(self, call: Callable[[], Coroutine[Any, Any, T]], passing: frozenset[int] = PASSING) -> T:
        """Call again after temporary failures, as the retry policy says.

        Args:
            call: What sends requests.
            passing: HTTP statuses of temporary failures.

        Raises:
            ServiceProblem: The service answers with an error.
            ServiceAway: The service cannot be reached.
        """
        return await stamina.AsyncRetryingCaller(**self._retries())(self._may_pass(passing), call)

    @contextlib.asynccontextmanager
    async def opened(self, request: Request) -> AsyncIterator[httpx.Response]:
        """Send a request, repeatedly until a response begins, and let the caller read its body.

        A failure in the body is final.

        Raises:
            ServiceProblem: The service answers with an error.
            ServiceAway: The service cannot be reached, or the connection was lost.
        """
        async with contextlib.AsyncExitStack() as stack:
            yield await stamina.AsyncRetryingCaller(**self._retries())(
                self._may_pass(PASSING), lambda: stack.enter_async_context(self._open(request))
            )

    async def stream(
        self,
        request: Callable[[], Request],
        read: Callable[[httpx.Response], AsyncGenerator[T]],
        passing: frozenset[int] = PASSING,
    ) -> AsyncGenerator[T]:
        """Yield the items of a stream; reconnects until `read` ends without an error.

        The retry policy starts anew after each connection that brought an item or was stable.

        Args:
            request: Returns the request for the items that are still missing.
            read: Reads the items of one response; raises `httpx.TransportError` if they are incomplete.
            passing: HTTP statuses after which the request is repeated.

        Raises:
            ServiceProblem: The service answers with an error.
            ServiceAway: The service cannot be reached.
        """
        while True:
            async for attempt in stamina.retry_context(self._may_pass(passing), **self._retries()):
                with attempt:
                    works_from = float("inf")  # time at which the connection counts as working
                    try:
                        async with self._open(request()) as response, contextlib.aclosing(read(response)) as items:
                            works_from = time.monotonic() + STABLE_SECONDS
                            async for item in items:
                                works_from = 0.0
                                yield item
                    except ServiceAway:
                        if time.monotonic() < works_from or not self._retry.seconds:
                            raise
                    else:
                        return

    @contextlib.asynccontextmanager
    async def _open(self, request: Request) -> AsyncIterator[httpx.Response]:
        """Send a request once. A connection that fails, also while the body is read, raises `ServiceAway`."""
        try:
            async with self._http.stream(
                request.method,
                request.path,
                params={name: value for name, value in request.params.items() if value is not None},
                headers={**({} if request.body is None else {"Content-Type": "application/json"}), **request.headers},
                content=request.body,
                timeout=httpx.Timeout(request.silence, connect=_CONNECT_SECONDS),
            ) as response:
                if not (response.is_success or response.status_code in request.expected):
                    await response.aread()
                    raise problem_in(response)
                yield response
        except httpx.TransportError as error:
            raise ServiceAway(self._url, str(error) or type(error).__name__) from error

    def _may_pass(self, passing: frozenset[int]) -> Callable[[Exception], bool | float]:
        """A retry hook for stamina: returns whether to repeat a failed request, or the seconds to wait before that."""

        def hook(error: Exception) -> bool | float:
            if isinstance(error, ServiceProblem) and error.status in passing:
                asked = error.retry_after
                return True if asked is None else asked <= self._retry.seconds and max(asked, self._retry.first_wait)
            return isinstance(error, ServiceAway)

        return hook

    def _retries(self) -> _Retries:
        retry = self._retry
        return {
            "attempts": None if retry.seconds else 1,
            "timeout": retry.seconds or None,
            "wait_initial": retry.first_wait,
            "wait_max": retry.longest_wait,
            # Up to a second by default, so that clients do not all retry at the same time when the service has
            # restarted.
            "wait_jitter": 4 * retry.first_wait,
        }


def segment(text: str) -> str:
    """Text as one segment of a URL's path."""
    return quote(text, safe="")


def json_body(**fields: object) -> bytes:
    """Encode fields as a JSON object: without those that are None, and with null for NULL.

    The service validates the values.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    return json.dumps({name: None if value is NULL else value for name, value in given.items()}).encode()
