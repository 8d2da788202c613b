"""The metadata services of three clouds, on loopback, as far as the node agent asks them."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Reply = tuple[int, str]


class Standin:
    """A service whose answers a test sets.

    Attributes:
        url: Its address.
        asked: Method and path of each request, in order.
        trouble: Answers instead of the cloud: it is given the request's handler, and returns True if it did.
    """

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[tuple[str, str]] = []
        self.trouble: Callable[[BaseHTTPRequestHandler], bool] = lambda _handler: False
        self.closing = threading.Event()

    def answer(self, handler: BaseHTTPRequestHandler) -> tuple[Reply, dict[str, str]]:
        raise NotImplementedError


class AwsStandin(Standin):
    """EC2 with session tokens that a test may let expire."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0
        self.valid: str | None = None
        self.documents: dict[str, str] = {}

    def expire(self) -> None:
        self.valid = None

    def interrupt(self, **document: str) -> None:
        self.documents["/latest/meta-data/spot/instance-action"] = json.dumps(document)

    def recommend(self, **document: str) -> None:
        self.documents["/latest/meta-data/events/recommendations/rebalance"] = json.dumps(document)

    def answer(self, handler: BaseHTTPRequestHandler) -> tuple[Reply, dict[str, str]]:
        if handler.command == "PUT":
            if handler.path != "/latest/api/token" or "X-aws-ec2-metadata-token-ttl-seconds" not in handler.headers:
                return (400, ""), {}
            self.tokens += 1
            self.valid = f"token-{self.tokens}"
            return (200, self.valid), {}
        if self.valid is None or handler.headers.get("X-aws-ec2-metadata-token") != self.valid:
            return (401, ""), {}
        document = self.documents.get(handler.path)
        return ((404, "<html>404 - Not Found</html>") if document is None else (200, document)), {}


class GcpStandin(Standin):
    """Compute Engine, with questions that are held open until the answer changes."""

    def __init__(self) -> None:
        super().__init__()
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def answer(self, handler: BaseHTTPRequestHandler) -> tuple[Reply, dict[str, str]]:
        if handler.headers.get("Metadata-Flavor") != "Google":
            return (403, ""), {}
        parts = urlsplit(handler.path)
        key = parts.path.removeprefix("/computeMetadata/v1/instance/")
        query = parse_qs(parts.query)
        if parts.path == "/computeMetadata/v1/":
            return (200, "instance/\n"), {"Metadata-Flavor": "Google"}
        if key not in self.values:
            return (404, ""), {}
        with self._changed:
            if query.get("wait_for_change") == ["true"]:
                known = query["last_etag"][0]
                self._changed.wait_for(lambda: self._tag(key) != known, timeout=float(query["timeout_sec"][0]))
            return (200, self.values[key]), {"Metadata-Flavor": "Google", "ETag": self._tag(key)}

    def _tag(self, key: str) -> str:
        return self.values[key].encode().hex()[:16]


class AzureStandin(Standin):
    """Azure, with the list of a scale set's events."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = "spot_3"
        self.events: list[dict[str, Any]] = []

    def add(self, kind: str, not_before: str, *machines: str) -> None:
        self.events.append(
            {
                "EventId": f"id-{len(self.events)}",
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": list(machines),
                "EventStatus": "Scheduled" if not_before else "Started",
                "NotBefore": not_before,
                "EventSource": "Platform",
            }
        )

    def answer(self, handler: BaseHTTPRequestHandler) -> tuple[Reply, dict[str, str]]:
        parts = urlsplit(handler.path)
        if handler.headers.get("Metadata") != "true" or "api-version" not in parse_qs(parts.query):
            return (400, ""), {}
        if parts.path == "/metadata/instance/compute/name":
            return (200, self.machine), {}
        if parts.path == "/metadata/scheduledevents":
            return (200, json.dumps({"DocumentIncarnation": len(self.events), "Events": self.events})), {}
        return (404, ""), {}


@contextlib.contextmanager
def serving(standin: Standin) -> Iterator[None]:
    """Serve it on a free port inside the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            standin.asked.append((self.command, self.path))
            if standin.trouble(self):
                return
            (status, text), headers = standin.answer(self)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    standin.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield
    finally:
        standin.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def hangs(standin: Standin) -> Callable[[BaseHTTPRequestHandler], bool]:
    """Trouble: the request is taken and never answered."""
    return lambda _handler: standin.closing.wait(60) or True


def trickles(standin: Standin) -> Callable[[BaseHTTPRequestHandler], bool]:
    """Trouble: an answer without an end, byte by byte."""

    def trouble(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        with contextlib.suppress(OSError):
            while not standin.closing.wait(0.02):
                handler.wfile.write(b" ")
                handler.wfile.flush()
        return True

    return trouble


def says(status: int, text: str) -> Callable[[BaseHTTPRequestHandler], bool]:
    """Trouble: one answer to everything."""

    def trouble(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(text.encode())))
        handler.end_headers()
        handler.wfile.write(text.encode())
        return True

    return trouble
