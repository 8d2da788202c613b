"""Gzip compression of JSON responses; streams and ranges are not compressed."""

from __future__ import annotations

import gzip

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SMALLEST = 1024
"""Minimum size of a body that is compressed (bytes); smaller ones fit into one packet anyway."""
_LEVEL = 5
_INLINE = 64 * 1024
"""Maximum size of a body that is compressed on the event loop (bytes); larger ones are compressed in a thread."""


class CompressedJson:
    """Middleware that compresses complete JSON responses to GET requests.

    Responses to other methods, such as a new token, are not compressed, because a compressed length can reveal the
    content.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        accepted = accepts_gzip(Headers(scope=scope).get("accept-encoding", ""))
        held: Message | None = None

        async def compressed(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and _is_json(message):
                held = message
                return
            if held is None:
                await send(message)
                return
            start, held = held, None
            body = message.get("body", b"")
            if not message.get("more_body") and len(body) >= SMALLEST:
                headers = MutableHeaders(scope=start)
                headers.add_vary_header("Accept-Encoding")
                if accepted:
                    body = _packed(body) if len(body) <= _INLINE else await run_in_threadpool(_packed, body)
                    headers["Content-Encoding"] = "gzip"
                    headers["Content-Length"] = str(len(body))
            await send(start)
            await send({**message, "body": body})

        await self._app(scope, receive, compressed)


def accepts_gzip(accepted: str) -> bool:
    for item in accepted.lower().split(","):
        coding, *parameters = (part.strip() for part in item.split(";"))
        if coding in ("gzip", "*"):
            return not any(part.replace(" ", "") in ("q=0", "q=0.0", "q=0.00", "q=0.000") for part in parameters)
    return False


def _is_json(start: Message) -> bool:
    headers = Headers(raw=start["headers"])
    return (
        start["status"] == 200
        and headers.get("content-type", "").partition(";")[0] == "application/json"
        and "content-encoding" not in headers
    )


def _packed(body: bytes) -> bytes:
    return gzip.compress(body, _LEVEL, mtime=0)
