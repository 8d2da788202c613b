"""uvicorn that does not wait for readers of endless streams."""

from __future__ import annotations

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
        """Listen. Head and body of an answer are two packets, and the second must not wait until the first is acknowledged."""
        for each in sockets or ():      # asyncio sees to that only where a socket's protocol was named when it was made
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, end the streams, and wait for what is left."""
        self._context.streams.close()
        await super().shutdown(sockets)
