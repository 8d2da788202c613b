"""The client's side of `service_load.py`: many kept connections and event streams in one cheap loop."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from moedisco_ray.core.driver_proofs import NONCE_BYTES, ReportAddress, request_headers

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_POSITION = re.compile(rb"^id: (\d+)\n", re.MULTILINE)


class Connection:
    """One HTTP/1.1 connection that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> Connection:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: bytes) -> bytes:
        """Send a request; the body of its answer, which must be a success."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _LENGTH.search(head)
        body = await self._reader.readexactly(int(length[1])) if length else b""
        if not head.startswith(b"HTTP/1.1 2"):
            raise RuntimeError(f"{request[:200]!r} was answered with {head!r} {body!r}")
        return body

    def close(self) -> None:
        self._writer.close()


def get(path: str, token: str, *headers: str) -> bytes:
    """A GET as it goes over the wire."""
    lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {token}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def post(path: str, token: str, document: Any) -> bytes:
    """A POST of JSON as it goes over the wire."""
    return _post(path, _compact(document), f"Authorization: Bearer {token}")


def _post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        *headers,
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _compact(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    return {"p50_ms": float(1000 * p50), "p99_ms": float(1000 * p99)}


async def requests(port: int, wanted: Sequence[bytes], concurrency: int, seconds: float) -> dict[str, float]:
    """Ask for one after the other on each of several connections.

    Returns:
        Requests per second, and quantiles of the time that one took.
    """
    took: list[float] = []
    following: Iterator[bytes] = itertools.cycle(wanted)
    began = time.perf_counter()

    async def one() -> None:
        connection = await Connection.open(port)
        while time.perf_counter() < began + seconds:
            asked = time.perf_counter()
            await connection.ask(next(following))
            took.append(time.perf_counter() - asked)
        connection.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(one())
    return {"per_second": len(took) / (time.perf_counter() - began), **quantiles(took)}


class Reader(asyncio.Protocol):
    """One reader of a run's events, which records the positions that arrive.

    Attributes:
        arrived: When each position did, from `first` on.
    """

    def __init__(self, request: bytes, first: int) -> None:
        self._request = request
        self._rest = b""
        self._transport: asyncio.Transport | None = None
        self.first = first
        self.arrived: list[float] = []
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.opened.done() and b"retry:" in data:
            self.opened.set_result(None)
        # A message may come in two pieces; its id never counts before its line is whole.
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        for position in _POSITION.findall(data[:end]):
            if int(position) != self.first + len(self.arrived):
                raise RuntimeError(f"position {int(position)} came instead of {self.first + len(self.arrived)}")
            self.arrived.append(now)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.lost = True

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


async def follow(port: int, token: str, run_id: str, first: int) -> Reader:
    """Open a stream that begins at a position."""
    request = get(f"/v1/runs/{run_id}/events?after={first - 1}", token)
    _, reader = await asyncio.get_running_loop().create_connection(lambda: Reader(request, first), "127.0.0.1", port)
    await reader.opened
    return reader


class Driver:
    """Reports events of a run as its driver does, one report after the other."""

    def __init__(self, connection: Connection, run_id: str, key: str) -> None:
        self._connection = connection
        self._address = ReportAddress(f"/v1/runs/{run_id}/report", 1, bytes.fromhex(key))
        self.sent = 0
        self.began: list[float] = []

    async def report(self, events: Sequence[dict[str, Any]]) -> None:
        """Send events; `began` holds for each when that was."""
        body = _compact({"first": self.sent, "events": events})
        proofs = request_headers(self._address, secrets.token_hex(NONCE_BYTES), body)
        request = _post(self._address.url, body, *(f"{name}: {value}" for name, value in proofs.items()))
        self.sent += len(events)
        self.began += [time.perf_counter()] * len(events)
        answer = json.loads(await self._connection.ask(request))
        if answer["next"] != self.sent:
            raise RuntimeError(f"the service wants line {answer['next']} instead of {self.sent}")
