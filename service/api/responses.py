"""Streamed responses, and the security headers of every response."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, cast

from fastapi.responses import StreamingResponse
from starlette.types import Send

from service.errors import NotFound

SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Response headers that forbid scripts of other origins, embedding in frames, and guessing of media types."""


class ClosedStream(StreamingResponse):
    """A streamed response that closes its source at once when the client disconnects, not at garbage collection."""

    async def stream_response(self, send: Send) -> None:
        async with aclosing(cast("Any", self.body_iterator)):
            await super().stream_response(send)


class EventStream(ClosedStream):
    """Server-sent events."""

    media_type = "text/event-stream"


def none_yet(what: str) -> NotFound:
    """The error for something that a run does not have yet, such as a report."""
    return NotFound(f"the run has no {what} yet")
