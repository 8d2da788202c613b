"""Answers that are sent while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from typing import Any, cast

from fastapi.responses import StreamingResponse
from starlette.types import Send

from service.errors import NotFound

SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Against scripts, frames and guesses about media types from elsewhere."""


class ClosedStream(StreamingResponse):
    """A streamed answer whose source is closed at once when the reader leaves, not when the collector gets to it."""

    async def stream_response(self, send: Send) -> None:
        """Send head and body."""
        async with aclosing(cast("Any", self.body_iterator)):
            await super().stream_response(send)


class EventStream(ClosedStream):
    """Server-sent events."""

    media_type = "text/event-stream"


def none_yet(what: str) -> NotFound:
    """A part of a run that is not there yet, or never will be."""
    return NotFound(f"the run has no {what} yet")
