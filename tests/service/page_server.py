"""The real application on a port of this machine, for a browser; it can go away and come back."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from api_client import Service, service
from reconciling import SECRET

from service.api.app import create_app
from service.api.server import Server

_SECONDS = 20


class Site:
    """A service that is served.

    Attributes:
        service: What is behind it.
        app: The application that is served.
        url: Where it is.
    """

    def __init__(self, behind: Service) -> None:
        self.service = behind
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Serve, on the same port as before."""
        door = socket.create_server(("127.0.0.1", self._port))
        self._port = door.getsockname()[1]
        behind = self.service
        self.app = create_app(
            behind.settings,
            behind.database,
            behind.jobs,
            planning=behind.planning,
            pools=behind.pools,
            dashboard=behind.dashboard,
            notifier=behind.notifier,
            secret=SECRET,
            secrets_key=SECRET,
            wake_reconciler=lambda: None,
        )
        self._server = Server(self.app, behind.settings)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [door]}, name="page server")
        self._thread.start()
        deadline = time.monotonic() + _SECONDS
        while not self._server.started:
            assert self._thread.is_alive(), "the server ended while it started"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        """Be gone."""
        self._server.should_exit = True
        self._thread.join(_SECONDS)
        assert not self._thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def site(home: Path, **settings: Any) -> Iterator[Site]:
    """A service under a directory, served until the context ends."""
    with service(home, **settings) as behind:
        served = Site(behind)
        try:
            yield served
        finally:
            served.stop()
