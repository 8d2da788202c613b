"""What a connection may take its time with, over real sockets, with deadlines of a fraction of a second."""

import contextlib
import logging
import socket
import time

import pytest
from api_client import service
from page_server import Site

from moedisco_ray.core.records.events import Event
from service.api import server as connections
from service.api.limits import capacity
from service.observability import Bounded

DEADLINE = 0.5
HEAD = b"GET /v1/identity HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    for awaited in connections.DEADLINES:
        monkeypatch.setitem(connections.DEADLINES, awaited, DEADLINE)
    with service(tmp_path) as behind:
        served = Site(behind)
        yield served
        served.stop()


@contextlib.contextmanager
def connected(site):
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        yield connection


def asking(site, path):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {site.service.plain['ann']}\r\n\r\n".encode()


def all_of(connection):
    """Everything until the other side closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


def until(connection, text, times=1):
    """What comes until a text has come so often."""
    received = b""
    while received.count(text) < times:
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


def trickle(connection, piece=b"x"):
    """Send a byte now and then until the connection is closed; returns how long that took."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < 10:
            connection.sendall(piece)
            time.sleep(DEADLINE / 10)
    return time.monotonic() - began


def closed(site, reason):
    registry = site.app.state.context.prometheus.registry
    return registry.get_sample_value("moedisco_connections_closed_total", {"reason": reason}) or 0


def test_a_connection_without_a_request_is_closed(site):
    with connected(site) as connection:
        assert all_of(connection) == b""
    assert closed(site, "head") == 1


def test_a_head_that_trickles_in_is_closed_all_the_same(site):
    with connected(site) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        assert trickle(connection) < 5
    assert closed(site, "head") == 1


def test_half_a_head_is_answered_408(site):
    with connected(site) as connection:
        connection.sendall(HEAD[:-2])
        assert all_of(connection).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("line", [b"Content-Length: 1000", b"Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come_is_answered_408(site, line):
    with connected(site) as connection:
        connection.sendall(b"POST /v1/session HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n\r\n")
        assert all_of(connection).startswith(b"HTTP/1.1 408 ")
    assert closed(site, "body") == 1


def test_a_body_that_trickles_in_behind_its_answer_is_closed(site):
    with connected(site) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        assert trickle(connection) < 5


def test_a_client_that_does_not_read_its_answer_is_disconnected(site):
    run = site.service.submit()["id"]
    with (site.service.directory(run) / "large.bin").open("wb") as file:
        file.truncate(64 * 2**20)
    with connected(site) as connection:
        connection.sendall(asking(site, f"/v1/runs/{run}/artifacts/large.bin"))
        deadline = time.monotonic() + 10
        while not closed(site, "reading"):
            assert time.monotonic() < deadline
            time.sleep(DEADLINE / 10)
        assert len(all_of(connection)) < 64 * 2**20


def test_requests_one_after_the_other_and_streams_outlive_the_deadlines(site):
    run = site.service.submit()["id"]
    with connected(site) as connection, connected(site) as watching:
        watching.sendall(asking(site, f"/v1/runs/{run}/events"))
        for _ in range(6):
            connection.sendall(HEAD)
            assert until(connection, b'"errors": []}').startswith(b"HTTP/1.1 401 ")
            time.sleep(DEADLINE / 3)
        site.service.report(run, Event("later"))
        until(watching, b"event: later")


def test_requests_sent_without_waiting_are_all_answered(site):
    with connected(site) as connection:
        connection.sendall(5 * HEAD)
        until(connection, b"HTTP/1.1 401 ", 5)


@pytest.mark.parametrize(
    ("descriptors", "connections", "streams"), [(64, 32, 16), (512, 160, 80), (1024, 416, 208), (2**20, 4096, 2048)]
)
def test_limits_follow_from_the_file_descriptors(descriptors, connections, streams):
    found = capacity(descriptors)
    assert (found.connections, found.streams) == (connections, streams)


def test_what_strangers_can_cause_is_logged_at_a_bounded_rate():
    clock = [0.0]
    bounded = Bounded(3, lambda: clock[0])

    def written(name, message):
        record = logging.LogRecord(name, logging.ERROR, "", 0, message, None, None)
        return record.getMessage() if bounded.filter(record) else None

    accept = ["socket.accept() out of system resource"] * 5
    found = [written("asyncio", message) for message in accept]
    assert [line is not None for line in found] == [True, True, True, False, False]
    assert "left out" in found[2]
    refused = {"event": "request", "status": 429}
    assert [written("service.api", refused) is not None for _ in range(4)] == [True, True, True, False]
    assert written("service.api", {"event": "request", "status": 200}) is not None
    assert all(written("service.background", "the database is away") for _ in range(9))
    clock[0] = 60.0
    assert written("asyncio", accept[0]) == accept[0]
