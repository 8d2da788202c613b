"""Between a client and an S3 server: a proxy on loopback that refuses, throttles, slows down and cuts connections."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["pass", "refuse", "throttle", "slow", "cut"]
"""`refuse`: hangs up. `throttle`: answers 503. `slow`: pauses after each piece of what is sent and answered. `cut`:
hangs up in the middle of what is sent, or of the answer to a GET, which says how long it would be."""
Faults = Callable[[str, str], Fault]
"""From a request's method and path to what becomes of it."""

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_CHUNK = 1 << 16
_PAUSE, _ANSWER_PAUSE = 0.05, 0.01
"""Pauses of what is slow, after each piece that is sent or answered (s): a run sends little and asks often."""
_PER_CONNECTION = ("transfer-encoding", "connection")


def seeded(faults: Sequence[Fault], share: float, seed: int) -> Faults:
    """A seeded share of all requests meets with the faults, in turn."""
    chance, turns = random.Random(seed), itertools.cycle(faults)
    return lambda _method, _path: next(turns) if chance.random() < share else "pass"


def uploads(fault: Fault, share: float, seed: int) -> Faults:
    """A seeded share of what is written meets with the fault."""
    chance = random.Random(seed)
    return lambda method, _path: fault if method in ("PUT", "POST") and chance.random() < share else "pass"


class FaultyS3:
    """The proxy.

    Args:
        server: HOST:PORT of the server.

    Attributes:
        faults: May be replaced at any time.
        counts: How often each was done.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        self.faults: Faults = lambda _method, _path: "pass"
        self.counts: dict[Fault, int] = {"pass": 0, "refuse": 0, "throttle": 0, "slow": 0, "cut": 0}
        self._lock = threading.Lock()

    def fault(self, method: str, path: str) -> Fault:
        """What becomes of this request."""
        with self._lock:
            fault = self.faults(method, path)
            self.counts[fault] += 1
        return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyS3

    def _serve(self) -> None:
        fault = self.proxy.fault(self.command, self.path)
        if fault == "refuse":
            self._hang_up()
            return
        if fault == "cut" and self.command != "GET":
            self.rfile.read(next(self._pieces(), 0) // 2)
            self._hang_up()
            return
        body = self._body(pause=_PAUSE if fault == "slow" else 0.0)
        if fault == "throttle":
            self._answer(503, [("Content-Type", "application/xml")], _SLOW_DOWN)
        else:
            self._forward(body, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self, pause: float) -> bytes:
        parts = []
        for size in self._pieces():
            for start in range(0, size, _CHUNK):
                parts.append(self.rfile.read(min(_CHUNK, size - start)))
                time.sleep(pause)
        return b"".join(parts)

    def _pieces(self) -> Iterator[int]:
        """Sizes of the body's pieces; each must be read before the next is asked for."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield int(self.headers.get("Content-Length", 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield size
            self.rfile.readline()
        self.rfile.readline()

    def _forward(self, body: bytes, fault: Fault) -> None:
        with contextlib.closing(http.client.HTTPConnection(self.proxy.server)) as upstream:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            chunked = "Transfer-Encoding" in self.headers
            upstream.request(
                self.command, self.path, iter([body]) if chunked else body, headers, encode_chunked=chunked
            )
            answer = upstream.getresponse()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _PER_CONNECTION]
            self._answer(answer.status, kept, answer.read(), fault)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: Fault = "pass") -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self._send(body, fault)

    def _send(self, body: bytes, fault: Fault) -> None:
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self._hang_up()
            return
        for start in range(0, max(len(body), 1), _CHUNK):
            time.sleep(_ANSWER_PAUSE if fault == "slow" else 0.0)
            self.wfile.write(body[start : start + _CHUNK])

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def faulty_s3(server: str) -> Iterator[tuple[FaultyS3, str]]:
    """A proxy before HOST:PORT, and its own."""
    proxy = FaultyS3(server)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listener:
        listener.daemon_threads = True
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield proxy, f"127.0.0.1:{listener.server_port}"
        finally:
            listener.shutdown()
            thread.join()
