"""A Google Cloud Storage server on loopback, in memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import time
from collections.abc import Iterator

from gcp_storage_emulator.server import create_server

_SECONDS = 60.0
"""Maximum time for the server to accept connections."""


@contextlib.contextmanager
def gcs_server(bucket: str) -> Iterator[str]:
    """The URI of a bucket on a server of its own, options and all.

    The server is another process: pyarrow sends some requests while it holds the interpreter's lock.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(port, bucket), daemon=True)
    server.start()
    try:
        _wait_for(port)
        yield f"gs://anonymous@{bucket}?scheme=http&endpoint_override=127.0.0.1:{port}"
    finally:
        server.kill()
        server.join()


def _serve(port: int, bucket: str) -> None:
    create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket).run()


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
