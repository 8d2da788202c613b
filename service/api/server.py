"""A uvicorn server with deadlines for its clients, so that idle connections cannot use up the service.

uvicorn limits the time between two requests but not the time for a request to arrive. A connection that sends nothing,
or one byte now and then, stays open, until `limit_concurrency` refuses all clients or asyncio runs out of file
descriptors. Hypercorn and Granian have no deadline for bodies either, and a service on a laptop has no reverse proxy.
This subclass of uvicorn's protocol therefore derives from h11's state what the client has to do next (send a head, send
a body, read the response) and sets one deadline for it, which a trickle of bytes does not extend. If there are too many
connections, it closes the one that has waited longest for its client. A connection with a complete request is never
closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from typing import Any, Literal, cast

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from service.api.context import ServiceContext
from service.api.limits import Capacity
from service.api.proxies import MarkedProxies
from service.observability import PrometheusMetrics
from service.settings import Settings, networks

Awaited = Literal["head", "next request", "body", "reading", "closing"]
"""What the server waits for the client to do: send a head, a next request or a body, read the response, or close the
connection."""

DEADLINES: dict[Awaited, float] = {"head": 10.0, "body": 30.0, "reading": 60.0, "closing": 10.0}
"""Time that the client has for what the server waits for, in seconds. "reading" is the time for each 64 KB of a
response. The time for "next request" is uvicorn's `timeout_keep_alive`."""
ACCEPTED_AT_ONCE = 16
"""Maximum number of connections that asyncio accepts per wake-up, to limit how many file descriptors it takes at
once."""
SPARE = 16
"""Number of the newest waiting connections that are never closed to make room, because their requests may be
arriving."""
GRACE_SECONDS = 5
"""Maximum wait for requests in progress when the service stops, in seconds."""
KEEP_ALIVE_SECONDS = 30
"""Maximum time from a response to the arrival of the next request, in seconds."""
_QUEUED = 2048
"""Maximum number of connections that wait in the kernel to be accepted."""


class Connections(ServerState):
    """Open connections of a server.

    `waiting` contains the connections whose client must act next; the longest wait comes first.

    Args:
        most: Maximum number of open connections; beyond it, waiting connections are closed.
        prometheus: Metrics that count closed connections.
    """

    def __init__(self, most: int, prometheus: PrometheusMetrics) -> None:
        super().__init__()
        self.waiting: dict[DeadlineProtocol, None] = {}
        self._most = most
        self._prometheus = prometheus

    def make_room(self) -> None:
        """Close waiting connections, longest wait first, until the limit holds or only `SPARE` of them remain."""
        while len(self.connections) > self._most and len(self.waiting) > SPARE:
            next(iter(self.waiting)).drop("no room")

    def count_closed(self, reason: str) -> None:
        """Count a connection that was closed before its client had finished."""
        self._prometheus.closed.labels(reason).inc()


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 protocol that closes the connection when the client misses a deadline."""

    server_state: Connections
    _awaited: Awaited | None = None
    _stalled = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline for the first request, and make room if there are too many connections."""
        super().connection_made(transport)
        self._update_deadline()
        self.server_state.make_room()

    def data_received(self, data: bytes) -> None:
        """Process received bytes, and start a new deadline if they complete what the server waited for."""
        super().data_received(data)
        self._update_deadline()

    def on_response_complete(self) -> None:
        """Start the deadline for the next request."""
        super().on_response_complete()
        self._update_deadline()

    def pause_writing(self) -> None:
        """Start the deadline for reading, because the client has not read what was sent."""
        super().pause_writing()
        self._stalled = True
        self._update_deadline()

    def resume_writing(self) -> None:
        """End the deadline for reading, because the client has read enough."""
        super().resume_writing()
        self._stalled = False
        self._update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._wait_for(None)

    def drop(self, reason: str) -> None:
        """Close the connection at once and discard unsent data."""
        self.server_state.count_closed(reason)
        self.server_state.connections.discard(self)  # at once, not only when the event loop closes it
        self._wait_for(None)
        self.transport.abort()

    def _update_deadline(self) -> None:
        """Start a new deadline if the server now waits for something else from the client than before."""
        awaited = self._awaited_step()
        if awaited != self._awaited:
            self._wait_for(awaited)

    def _awaited_step(self) -> Awaited | None:
        if self.transport.is_closing():
            return "closing"
        if self._stalled:
            return "reading"
        if self.conn.their_state is h11.SEND_BODY:
            return "body"
        if self.conn.their_state is h11.IDLE:
            return "head" if self.cycle is None else "next request"
        return None

    def _wait_for(self, awaited: Awaited | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._awaited, self._timer = awaited, None
        self.server_state.waiting.pop(self, None)
        if awaited is not None:
            seconds = self.timeout_keep_alive if awaited == "next request" else DEADLINES[awaited]
            self._timer = self.loop.call_later(seconds, self._expire, awaited)
            self.server_state.waiting[self] = None

    def _expire(self, awaited: Awaited) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and (awaited == "body" or self.conn.trailing_data[0]):
            self._say_timeout()
        self.drop(awaited)

    def _say_timeout(self) -> None:
        """Send status 408 without waiting for the client to read it."""
        if self.cycle is not None:
            self.cycle.disconnected = True  # uvicorn then discards the application's response
        text = b"the request did not arrive in time"
        headers = [
            ("content-type", "text/plain; charset=utf-8"),
            ("content-length", str(len(text))),
            ("connection", "close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (h11.Response(status_code=408, headers=headers), h11.Data(data=text), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))


def behind_proxies(app: ASGIApp, settings: Settings) -> ASGIApp:
    """The application with the addresses of clients that trusted proxies name."""
    if not settings.forwarded_allow_ips:
        return app
    # uvicorn types its applications more narrowly than Starlette.
    inner: Any = ProxyHeadersMiddleware(cast("Any", app), settings.forwarded_allow_ips)
    if settings.sign_in_header is None:
        return cast("ASGIApp", inner)
    return MarkedProxies(inner, networks(settings.forwarded_allow_ips))


class Server(uvicorn.Server):
    """Server for an application from `create_app`."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._context: ServiceContext = app.state.context
        self.capacity: Capacity = self._context.capacity
        super().__init__(
            uvicorn.Config(
                behind_proxies(app, settings),
                host=settings.host,
                port=settings.port,
                log_config=None,
                access_log=False,
                server_header=False,
                http=DeadlineProtocol,
                ws="none",
                backlog=ACCEPTED_AT_ONCE,
                # This limit is higher than that of `Connections`, which closes waiting connections first. Only
                # connections with a request in progress can reach it, because `Connections` never closes them.
                limit_concurrency=self.capacity.connections + 2 * SPARE,
                timeout_graceful_shutdown=GRACE_SECONDS,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                proxy_headers=False,
            )
        )
        self.server_state = Connections(self.capacity.connections, self._context.prometheus)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, with Nagle's algorithm disabled."""
        for each in sockets or ():
            # The head and the body of a response are two packets; with Nagle's algorithm the second would wait until
            # the first is acknowledged. asyncio disables the algorithm only for sockets that were created with an
            # explicit protocol.
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The objects that exist now are never freed, so the garbage collector need not scan them.
        gc.collect()
        gc.freeze()
        await super().startup(sockets)
        for each in sockets or ():
            # asyncio also set the kernel's queue to ACCEPTED_AT_ONCE, which is so short that the kernel would drop
            # connections.
            each.listen(_QUEUED)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, end the streams, and wait for the remaining requests."""
        self._context.streams.close()
        await super().shutdown(sockets)
