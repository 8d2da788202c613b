"""A run's events and logs as streams."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator

import httpx
from httpx_sse import EventSource, ServerSentEvent

from moedisco_ray.core.records.events import Event
from service.client.http import PASSING, Connection, Request

_END = "end"
"""Type of the message that follows a run's last event."""
_PASSING = PASSING | {500}
"""HTTP statuses after which a stream reconnects. A service that shuts down answers interrupted requests with 500."""
_OWN_CONNECTION = {"Accept-Encoding": "identity", "Connection": "close"}
"""Request headers that give a stream its own connection: a reused one can lead back to a service that is shutting
down."""
_SILENCE_SECONDS = 45.0
"""Maximum time in which nothing arrives on an event stream, in seconds. The service pings every 15 seconds."""


async def events(
    connection: Connection, path: str, after: int | None, follow: bool
) -> AsyncGenerator[tuple[int, Event]]:
    """Yield a run's events with their positions, each once and in order; reconnects if the connection is lost.

    Args:
        connection: Connection to the service.
        path: Path of the event stream.
        after: Position of the last event that the caller has seen; None starts with the first event.
        follow: Whether to wait for new events until the run ends; otherwise stop after the newest event.
    """
    last = -1 if after is None else after

    def request() -> Request:
        seen = {} if last < 0 else {"Last-Event-ID": str(last)}
        return Request(
            "GET",
            path,
            {"follow": follow},
            {"Accept": "text/event-stream", **_OWN_CONNECTION, **seen},
            silence=_SILENCE_SECONDS,
        )

    def read(response: httpx.Response) -> AsyncGenerator[tuple[int, Event]]:
        return _new_events(response, last, follow)

    async with contextlib.aclosing(connection.stream(request, read, _PASSING)) as found:
        async for last, event in found:
            yield last, event


async def _new_events(response: httpx.Response, last: int, follow: bool) -> AsyncGenerator[tuple[int, Event]]:
    """Yield the events after position `last` from one response.

    Raises:
        httpx.RemoteProtocolError: Events are missing, so that a new request is needed.
    """
    seen = last
    async with contextlib.aclosing(EventSource(response).aiter_sse()) as messages:
        async for message in messages:
            if message.event == _END:
                return
            if not message.data:  # a ping
                continue
            position, event = _event(message)
            if position > seen + 1:
                raise httpx.RemoteProtocolError(f"the stream jumped from event {seen + 1} to {position}")
            if position == seen + 1:
                seen = position
                yield position, event
    # A service that shuts down also closes the stream early. Without `follow`, only a response without new events is
    # the end.
    if follow or seen > last:
        raise httpx.RemoteProtocolError("the stream ended before the run did")


def _event(message: ServerSentEvent) -> tuple[int, Event]:
    try:
        event = json.loads(message.data)
        return int(message.id), Event(
            type=event["type"],
            stage=event.get("stage"),
            unit=event.get("unit"),
            data=event.get("data") or {},
            time=event["time"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise httpx.RemoteProtocolError(f"a message of the stream is no event: {message.data[:80]!r}") from error


async def log_lines(connection: Connection, path: str, tail: int) -> AsyncGenerator[str]:
    """Yield the last `tail` lines of a log, then new lines until the run ends.

    A log has no positions, so a lost connection ends this stream: a new connection would repeat lines or miss some.
    """
    # No timeout: a log may have no new line for as long as a training step takes.
    request = Request("GET", path, {"tail": tail, "follow": True}, _OWN_CONNECTION, silence=None)
    rest = ""
    async with connection.opened(request) as response:
        async for text in response.aiter_text():
            # Not `aiter_lines`, which also splits at U+2028 and other separators inside a line.
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                yield line.removesuffix("\r")
    if rest:
        yield rest
