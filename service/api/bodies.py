"""Limits the size of request bodies, and parses JSON strictly."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import Depends, HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import problem_response
from service.errors import BadRequest, InvalidRequest, Overloaded, TooLarge, TooMany, Unauthorised
from service.schemas.mistakes import NO_OBJECT, converted, strict_json

MOST_READ = 256 * 2**20
"""Limit on the total size of large bodies that are read at the same time (bytes)."""
SMALL = 64 * 2**10
"""Maximum size of a body that is read without authentication (bytes). The limit on connections bounds their total
size."""
AT_ONCE = 2
"""Maximum number of large bodies to one path with one credential that are read and answered at the same time. An owner
has one estimate that is computed and one that waits: more would be read only to be refused."""


class BodyLimit:
    """Middleware that refuses a request body above the limit, and reads a smaller one before it calls the application.

    A body above `SMALL` is read only from a caller with a valid token or session, so that other clients cannot use up
    the memory that drivers need for their reports. The total size of all large bodies being read is limited too. Large
    requests to a path with one credential wait for each other: forty of one client do not delay those of others.

    Args:
        app: Next application.
        limit_of: Returns the maximum size of a body sent to a path (bytes).
        check: Raises `Unauthorised` unless the request has a valid credential; called in a thread.
        credential_of: Returns the credential that `check` looks at; None if there is none.
        streamed: Paths whose routes read their bodies in parts, after they have checked the caller.
        most: Limit on the total size of large bodies that are read at the same time (bytes).
    """

    def __init__(
        self,
        app: ASGIApp,
        limit_of: Callable[[str], int],
        check: Callable[[Request], None],
        credential_of: Callable[[Request], str | None],
        streamed: re.Pattern[str] | None = None,
        most: int = MOST_READ,
    ) -> None:
        self._app = app
        self._limit_of = limit_of
        self._check = check
        self._credential_of = credential_of
        self._streamed = streamed
        self._left = most
        self._gates = WeakValueDictionary[tuple[str, str], asyncio.Semaphore]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        if self._streamed is not None and self._streamed.fullmatch(scope["path"]):
            await self._app(scope, receive, _closing(send))
            return
        async with self._gate(scope):
            await self._answer(scope, receive, send)

    def _gate(self, scope: Scope) -> contextlib.AbstractAsyncContextManager[None]:
        """Where a large request waits for others like it, which would keep those of other clients waiting."""
        credential = self._credential_of(Request(scope))
        is_small = _announced(scope) <= SMALL and b"transfer-encoding" not in dict(scope["headers"])
        if is_small or credential is None:
            return contextlib.nullcontext()
        return self._gates.setdefault((scope["path"], credential), asyncio.Semaphore(AT_ONCE))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self._limit_of(scope["path"])
        try:
            body = await self._read(scope, receive, limit)
        except (TooLarge, Overloaded, Unauthorised, TooMany) as error:
            refusal = problem_response(error, Request(scope))
            refusal.headers["Connection"] = "close"  # otherwise the unread rest would be parsed as a request
            await refusal(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive, limit: int) -> bytes | None:
        announced = _announced(scope)
        if announced > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size, counted, more = 0, 0, True
        large = False
        try:
            while more:
                if not large and max(announced, size) > SMALL:
                    await run_in_threadpool(self._check, Request(scope))
                    large = True
                message = await receive()
                if message["type"] != "http.request":
                    return None  # the client disconnected
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    raise _too_large(limit)
                if large:
                    self._left -= size - counted
                    counted = size
                if self._left < 0:
                    raise Overloaded("too many large requests arrive at once; try again later")
                more = message.get("more_body", False)
        finally:
            self._left += counted
        return b"".join(parts)


class StrictRoute(APIRoute):
    """A route that parses JSON with `strict_json`, and refuses values that validation would convert to another type."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, called with a request that parses JSON strictly."""
        handler = super().get_route_handler()
        document = None if self.body_field is None else self.body_field.field_info.annotation
        schema: TypeAdapter[Any] | None = None if document is None else TypeAdapter(document)

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request, schema))

        return strict


class _StrictRequest(Request):
    def __init__(self, request: Request, schema: TypeAdapter[Any] | None) -> None:
        super().__init__(request.scope, request.receive)
        self._schema = schema

    async def json(self) -> Any:
        try:
            raw = strict_json(await self.body())
        except BadRequest as error:  # FastAPI turns any other error raised here into a 400 without the detail
            raise HTTPException(400, error.detail) from error
        except InvalidRequest as error:
            raise HTTPException(422, error.mistakes) from error
        # FastAPI reports other mistakes, when it validates the value in the same way.
        with contextlib.suppress(ValidationError):
            if self._schema is not None and (found := converted(self._schema, raw)):
                raise HTTPException(422, found)
        return raw


async def _json_body(request: Request) -> bytes:
    body = await request.body()
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if body and media_type != "application/json" and not media_type.endswith("+json"):
        raise InvalidRequest([("body", NO_OBJECT)])
    return body


RawBody = Annotated[bytes, Depends(_json_body)]
"""A JSON body that is not parsed on the event loop, because that could take long."""


def _closing(send: Send) -> Send:
    """Close the connection after a refusal: otherwise the unread rest of the body would be parsed as a request."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= HTTPStatus.BAD_REQUEST:
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return closing


def _announced(scope: Scope) -> int:
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(length) if length.isdigit() else 0


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than the limit of {limit} bytes")


def _replay(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
