"""Limits the size of request bodies, and parses JSON strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import problem_response
from service.errors import Overloaded, TooLarge, TooMany, Unauthorised

MOST_READ = 256 * 2**20
"""Limit on the total size of large bodies that are read at the same time (bytes)."""
SMALL = 64 * 2**10
"""Maximum size of a body that is read without authentication (bytes). The limit on connections bounds their total size."""
LARGEST = 2**53
"""Largest integer that every JSON parser reads exactly."""

_SUSPECT = tuple(re.compile(pattern) for pattern in (rb"\\u0000", rb"\d{16}", rb"[eE]\+?\d{3}"))
"""Patterns of values that may be invalid; a body without them needs no check. One combined pattern would take twice as long."""


class BodyLimit:
    """Middleware that refuses a request body above the limit, and reads a smaller one completely before it calls the application.

    A body above `SMALL` is read only from a caller with a valid token or session, so that other clients cannot use up
    the memory that drivers need for their reports. The total size of all large bodies being read is limited too.

    Args:
        app: Next application.
        limit_of: Returns the maximum size of a body sent to a path (bytes).
        check: Raises `Unauthorised` unless the request has a valid credential; called in a thread.
        most: Limit on the total size of large bodies that are read at the same time (bytes).
    """

    def __init__(
        self, app: ASGIApp, limit_of: Callable[[str], int], check: Callable[[Request], None], most: int = MOST_READ,
    ) -> None:
        self._app = app
        self._limit_of = limit_of
        self._check = check
        self._left = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        limit = self._limit_of(scope["path"])
        try:
            body = await self._read(scope, receive, limit)
        except (TooLarge, Overloaded, Unauthorised, TooMany) as error:
            refusal = problem_response(error, Request(scope))
            refusal.headers["Connection"] = "close"     # otherwise the unread rest would be parsed as a request
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
                    return None     # the client disconnected
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
    """A route that parses JSON with `strict_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, called with a request that parses JSON strictly."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def json(self) -> Any:
        return strict_json(await self.body())


def strict_json(body: bytes) -> Any:
    """Parse JSON.

    Raises:
        HTTPException: The status is 400 if the body is not JSON, is nested too deeply, or contains a lone surrogate or NaN. It is
            422, in the form of a validation error, if a text contains a NUL character or a number is beyond `LARGEST`.
    """
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error
    if any(pattern.search(body) for pattern in _SUSPECT) and (mistake := _unfit(value, ("body",))) is not None:
        raise HTTPException(422, [mistake])     # FastAPI turns any other error raised here into a 400
    return value


def _unfit(value: Any, place: tuple[str | int, ...]) -> dict[str, Any] | None:
    if isinstance(value, str) and "\0" in value:
        return {"type": "nul", "loc": place, "msg": "contains a NUL character", "input": None}
    if isinstance(value, int) and abs(value) > LARGEST:
        return {"type": "large", "loc": place, "msg": f"is beyond {LARGEST}", "input": None}
    if isinstance(value, float) and not math.isfinite(value):
        return {"type": "infinite", "loc": place, "msg": "is too large", "input": None}
    if isinstance(value, list):
        return next((found for i, child in enumerate(value) if (found := _unfit(child, (*place, i)))), None)
    if isinstance(value, dict):
        names = (_unfit(key, place) for key in value)
        children = (_unfit(child, (*place, key)) for key, child in value.items())
        return next((found for part in (names, children) for found in part if found), None)
    return None


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
