"""A dashboard that is none: it writes down what reaches it, and answers more than an honest one would."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RAY_TOKEN = "ray-token-0123456789"
INDEX = '<!doctype html><script defer src="./static/js/main.js"></script><div id="root"></div>'


@dataclasses.dataclass
class Standin:
    """What is asked of it, and what it answers.

    Attributes:
        url: Where it listens.
        asked: Method, path with query, and headers of each request.
        bodies: Answers by path: status, headers and body.
    """

    url: str
    asked: list[tuple[str, str, dict[str, str]]] = dataclasses.field(default_factory=list)
    bodies: dict[str, tuple[int, dict[str, str], bytes]] = dataclasses.field(default_factory=dict)

    def answers(self, path: str, body: Any, status: int = 200, **headers: str) -> None:
        """Make a path answer with JSON, or with bytes as they are."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {} if isinstance(body, bytes) else {"Content-Type": "application/json"}
        self.bodies[path] = (
            status,
            {**kind, **{name.replace("_", "-"): value for name, value in headers.items()}},
            raw,
        )

    def paths(self) -> list[str]:
        """What was asked for."""
        return [path for _, path, _ in self.asked]


@contextlib.contextmanager
def dashboard() -> Iterator[Standin]:
    """A stand-in on a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            standin.asked.append(
                (self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            )
            status, headers, body = standin.bodies.get(self.path.partition("?")[0], (404, {}, b"404: Not Found"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Set-Cookie", f"ray-authentication-token={RAY_TOKEN}; Path=/")
            self.send_header("Access-Control-Allow-Origin", "*")
            self.send_header("Connection", "close, X-Hop")
            self.send_header("X-Hop", RAY_TOKEN)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    standin = Standin(f"http://127.0.0.1:{server.server_address[1]}")
    standin.answers("/", INDEX.encode(), Content_Type="text/html; charset=utf-8")
    standin.answers("/static/js/main.js", b"/* the dashboard's script */", Content_Type="text/javascript")
    standin.answers("/api/jobs/", [{"submission_id": "a-1"}])
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="dashboard stand-in")
    thread.start()
    try:
        yield standin
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
