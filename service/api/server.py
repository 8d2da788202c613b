"""uvicorn that answers without delay, and ends without waiting for readers of endless streams."""

from __future__ import annotations

import gc
import socket

import uvicorn
from fastapi import FastAPI

from service.api.context import Context


class Server(uvicorn.Server):
    """Ends every open stream before it waits for the requests under way.

    Args:
        config: uvicorn's own.
        app: What `create_app` returned.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._context: Context = app.state.context

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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, end the streams, and wait for what is left."""
        self._context.streams.close()
        await super().shutdown(sockets)
