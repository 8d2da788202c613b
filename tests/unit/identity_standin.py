"""The services from which machines of Google Cloud and of Azure get the tokens of their identities, on loopback."""

from __future__ import annotations

import base64
import contextlib
import json
import multiprocessing
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any

import pytest

HEADER = "the machine's own"
"""What Azure's service expects in a header of each request."""
_STORAGE = "https://storage.azure.com"
_LIFE = 3600
"""Time for which a token is valid (s)."""


@contextlib.contextmanager
def identities() -> Iterator[None]:
    """Run both services, in another process, and name them in the environment, as Azure does for its machines."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    try:
        assert ours.poll(60.0), "the services do not start"
        address = f"127.0.0.1:{ours.recv()}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GCE_METADATA_ROOT", address)
            patch.setenv("IDENTITY_ENDPOINT", f"http://{address}/azure")
            patch.setenv("IDENTITY_HEADER", HEADER)
            yield
    finally:
        server.kill()
        server.join()


def _serve(port: Connection) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Services)
    port.send(server.server_port)
    server.serve_forever()


class _Services(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        place = self.path.partition("?")[0]
        if place == "/azure":
            self._answer(_azure_token() if self.headers["X-IDENTITY-HEADER"] == HEADER else None)
        elif place.startswith("/computeMetadata/v1/instance/service-accounts/"):
            account = {"email": "node@project", "scopes": ["https://www.googleapis.com/auth/devstorage.read_write"]}
            token = {"access_token": "google", "expires_in": _LIFE, "token_type": "Bearer"}
            self._answer(token if place.endswith("/token") else account)
        else:
            self._answer(None)

    def _answer(self, found: dict[str, Any] | None) -> None:
        body = json.dumps(found or {"error": "invalid_request"}).encode()
        self.send_response(400 if found is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _azure_token() -> dict[str, Any]:
    """A token for storage. Its signature is none; Azurite checks only who issued it, for what and until when."""
    now = int(time.time())
    claims = {
        "aud": _STORAGE,
        "iss": "https://sts.windows.net/tenant/",
        "iat": now - 60,
        "nbf": now - 60,
        "exp": now + _LIFE,
    }
    parts = [json.dumps(each).encode() for each in ({"alg": "RS256", "typ": "JWT"}, claims)]
    token = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (*parts, b"signature"))
    return {"access_token": token, "expires_on": str(now + _LIFE), "resource": _STORAGE, "token_type": "Bearer"}
