"""Request bodies: none larger than the limit is read, and JSON is what every part of the service can hold."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import problem_response
from service.errors import TooLarge

LARGEST = 2**53
"""Beyond it a JSON number is not the same to every reader."""

_SUSPECT = re.compile(rb"\\u0000|(?<![\d.])\d{16}|[eE]\+?\d{3}")
"""What text must hold for a value to be refused; the rest need not be walked through."""


class BodyLimit:
    """Refuses a body above the limit as soon as that is known, and hands a smaller one on in one piece.

    Args:
        app: What comes next.
        limit_of: Path of the request to the bytes it may bring.
    """

    def __init__(self, app: ASGIApp, limit_of: Callable[[str], int]) -> None:
        self._app = app
        self._limit_of = limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        limit = self._limit_of(scope["path"])
        body = None if _announced(scope) > limit else await _read(receive, limit)
        if body is None:
            refusal = problem_response(TooLarge(f"the body may have {limit} bytes"), Request(scope))
            refusal.headers["Connection"] = "close"     # what was not read must not be taken for the next request
            await refusal(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)


class StrictRoute(APIRoute):
    """A route whose JSON is read by `strict_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, for a request that reads its JSON strictly."""
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
        HTTPException: 400: it is none, or has a lone surrogate, a number that is none, or too many levels. 422, with what
            validation would say: a text holds a NUL character, or a number is beyond `LARGEST`.
    """
    try:
        value = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is no JSON: {error}") from error
    if _SUSPECT.search(body) and (mistake := _unfit(value, ("body",))) is not None:
        raise HTTPException(422, [mistake])     # the only kind of error that FastAPI lets through from here
    return value


def _unfit(value: Any, place: tuple[str | int, ...]) -> dict[str, Any] | None:
    if isinstance(value, str) and "\0" in value:
        return {"type": "nul", "loc": place, "msg": "holds a NUL character", "input": None}
    if isinstance(value, int) and abs(value) > LARGEST:
        return {"type": "large", "loc": place, "msg": f"is beyond {LARGEST}", "input": None}
    if isinstance(value, float) and not math.isfinite(value):
        return {"type": "infinite", "loc": place, "msg": "is too large a number", "input": None}
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


async def _read(receive: Receive, limit: int) -> bytes | None:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
