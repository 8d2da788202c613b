"""Connections that cannot be held for nothing: deadlines for the client, and room for the next one.

uvicorn limits the time between two requests, but not the time that a request takes to arrive: a connection that sends
nothing, or one byte now and then, stays open. Its `limit_concurrency` then refuses everybody. asyncio accepts until no file
descriptor is left. Hypercorn and Granian have no deadline for a body either, and a reverse proxy cannot be asked of everyone
who starts a service on a laptop; the smallest remedy is this subclass of uvicorn's own protocol. It follows from h11's state
what the client owes (a head, a body, reading an answer), gives it one deadline that no trickle extends, and when there are
too many connections closes the one that has waited longest for its client. A request that has arrived is never closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from typing import Literal

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from service.api.context import ServiceContext
from service.api.limits import Capacity
from service.observability import PrometheusMetrics
from service.settings import Settings

Awaited = Literal["head", "next request", "body", "reading", "closing"]
"""What the client has to do next."""

DEADLINES: dict[Awaited, float] = {"head": 10.0, "body": 30.0, "reading": 60.0, "closing": 10.0}
"""Seconds; for the next request it is uvicorn's `timeout_keep_alive`. "reading" is the time for the next 64 KB of an answer."""
ACCEPTED_AT_ONCE = 16
"""Connections that asyncio accepts before one of them is looked at; all of them take a descriptor."""
SPARE = 16
"""The newest waiting connections, which are never closed for others: their request may be under way."""
GRACE_SECONDS = 5
"""Time for requests under way when the service ends (s)."""
KEEP_ALIVE_SECONDS = 30
"""Time from an answer until the next request has arrived (s)."""
_QUEUED = 2048
"""Connections that the kernel keeps until they are accepted."""


class Connections(ServerState):
    """The open connections of a server, and those that wait for their client, longest first.

    Args:
        most: Connections above which waiting ones are closed.
        prometheus: Count those that were closed.
    """

    def __init__(self, most: int, prometheus: PrometheusMetrics) -> None:
        super().__init__()
        self.waiting: dict[DeadlineProtocol, None] = {}
        self._most = most
        self._prometheus = prometheus

    def make_room(self) -> None:
        """Close the connections that have waited longest for their client, while there are too many."""
        while len(self.connections) > self._most and len(self.waiting) > SPARE:
            next(iter(self.waiting)).drop("no room")

    def count_closed(self, reason: str) -> None:
        """Count a connection that was closed before its client was done."""
        self._prometheus.closed.labels(reason).inc()


class DeadlineProtocol(H11Protocol):
    """HTTP/1.1 with deadlines for what the client has to do; needs a server whose state is `Connections`."""

    server_state: Connections
    _awaited: Awaited | None = None
    _stalled = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._update_deadline()
        self.server_state.make_room()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        super().data_received(data)
        self._update_deadline()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self._update_deadline()

    def pause_writing(self) -> None:
        """Begin to wait until the client has read more of its answer."""
        super().pause_writing()
        self._stalled = True
        self._update_deadline()

    def resume_writing(self) -> None:
        """Write on."""
        super().resume_writing()
        self._stalled = False
        self._update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing any more."""
        super().connection_lost(exc)
        self._wait_for(None)

    def drop(self, reason: str) -> None:
        """Close the connection at once, without sending what is left to send."""
        self.server_state.count_closed(reason)
        self.server_state.connections.discard(self)     # what is closed in the next turn of the loop counts as closed
        self._wait_for(None)
        self.transport.abort()

    def _update_deadline(self) -> None:
        """Start a deadline where the client owes something else than before."""
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
        """Answer 408, as far as it can be sent at once."""
        if self.cycle is not None:
            self.cycle.disconnected = True      # whatever the application still answers goes nowhere
        text = b"the request did not arrive in time"
        headers = [("content-type", "text/plain; charset=utf-8"), ("content-length", str(len(text))), ("connection", "close")]
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (h11.Response(status_code=408, headers=headers), h11.Data(data=text), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))


class Server(uvicorn.Server):
    """Serves one application.

    Args:
        app: What `create_app` returned.
        settings: What the operator set.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._context: ServiceContext = app.state.context
        self.capacity: Capacity = self._context.capacity
        super().__init__(uvicorn.Config(
            app, host=settings.host, port=settings.port, log_config=None, access_log=False, server_header=False,
            http=DeadlineProtocol, ws="none", backlog=ACCEPTED_AT_ONCE,
            # Above the number at which waiting connections are closed: reached only where requests under way take all of them.
            limit_concurrency=self.capacity.connections + 2 * SPARE,
            timeout_graceful_shutdown=GRACE_SECONDS, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            forwarded_allow_ips=settings.forwarded_allow_ips or None, proxy_headers=bool(settings.forwarded_allow_ips)))
        self.server_state = Connections(self.capacity.connections, self._context.prometheus)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and see that nothing delays an answer."""
        for each in sockets or ():
            # Head and body are two packets, and the second must not wait until the first is acknowledged. asyncio sees to that
            # only where the protocol was named when the socket was made.
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What is here now stays: the collector need not look through all of it again and again.
        gc.collect()
        gc.freeze()
        await super().startup(sockets)
        for each in sockets or ():
            # asyncio takes one number for what it accepts at once and for what the kernel queues; a short queue drops
            # connections, which their clients try again a second later.
            each.listen(_QUEUED)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, end the streams, and wait for what is left."""
        self._context.streams.close()
        await super().shutdown(sockets)
