"""A Google Cloud Storage server on loopback, in memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gcp_storage_emulator.server import RequestHandler, create_server

_SECONDS = 60.0
"""Maximum time for the server to accept connections."""


@contextlib.contextmanager
def gcs_server(bucket: str, requests: Path | None = None) -> Iterator[str]:
    """The URI of a bucket on a server of its own, options and all.

    The server is another process: pyarrow sends some requests while it holds the interpreter's lock. It writes the path
    of each request into the file `requests`, a line each.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(port, bucket, requests), daemon=True)
    server.start()
    try:
        _wait_for(port)
        yield f"gs://anonymous@{bucket}?scheme=http&endpoint_override=127.0.0.1:{port}"
    finally:
        server.kill()
        server.join()


def _serve(port: int, bucket: str, requests: Path | None) -> None:
    if requests is not None:
        for name in ("do_GET", "do_POST", "do_PUT", "do_DELETE"):
            setattr(RequestHandler, name, _noting(getattr(RequestHandler, name), requests))
    create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket).run()


def _noting(answer: Callable[[RequestHandler], None], requests: Path) -> Callable[[RequestHandler], None]:
    def noted(handler: RequestHandler) -> None:
        with requests.open("a", encoding="utf-8") as file:
            file.write(f"{handler.path}\n")
        answer(handler)

    return noted


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + _SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
