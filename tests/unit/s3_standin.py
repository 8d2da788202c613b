"""A real S3 server on loopback."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def s3_server(bucket: str, address: str = "127.0.0.1") -> Iterator[str]:
    """HOST:PORT of the process's server, with one bucket until the end; the environment has what its clients need."""
    host, port = _server(address).get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
            patch.setenv(name, value)
        made = boto3.resource("s3", endpoint_url=f"http://{host}:{port}").Bucket(bucket)
        made.create()
        try:
            yield f"{host}:{port}"
        finally:
            made.objects.all().delete()
            made.delete()


@functools.cache
def _server(address: str) -> ThreadedMotoServer:
    """Serves until the process ends: to stop it takes half a second."""
    server = ThreadedMotoServer(ip_address=address, port=0, verbose=False)
    server.start()
    return server
