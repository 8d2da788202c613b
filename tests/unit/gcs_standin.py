"""A Google Cloud Storage server on loopback, in memory."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from gcp_storage_emulator.server import create_server


@contextlib.contextmanager
def gcs_server(bucket: str) -> Iterator[str]:
    """The URI of a bucket on a server of its own, options and all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=bucket)
    server.start()
    try:
        yield f"gs://anonymous@{bucket}?scheme=http&endpoint_override=127.0.0.1:{port}"
    finally:
        server.stop()
