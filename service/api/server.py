"""uvicorn that answers without delay, gives its clients deadlines, and ends without waiting for readers of endless streams."""

from __future__ import annotations

import gc
import socket

import uvicorn
from fastapi import FastAPI

from service.api.capacity import Capacity
from service.api.connections import ACCEPTED_AT_ONCE, SPARE, Connections, DeadlineProtocol
from service.api.context import ServiceContext
from service.settings import Settings

GRACE_SECONDS = 5
"""Time for requests under way when the service ends (s)."""
KEEP_ALIVE_SECONDS = 30
"""Time from an answer until the next request has arrived (s)."""
_QUEUED = 2048
"""Connections that the kernel keeps until they are accepted."""


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
