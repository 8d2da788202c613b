"""Connections that are held for nothing, against a real service process: others are answered, and the log stays small."""

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from api_client import demo

from service.api.limits import capacity, raise_descriptor_limit

STREAMS_OF_A_TOKEN = 100
LOG_BYTES = 100_000
LONGEST_ANSWER = 1.0
"""Seconds from a request to its answer."""


class Target:
    """A service process under attack, and another client that uses it."""

    def __init__(self, home: Path, descriptors: int | None) -> None:
        self.log = home / "serve.log"
        self.descriptors = descriptors or resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        # As a login shell has it: a low soft limit, which the service may raise to the hard one.
        limited = ["sh", "-c", f'ulimit -Sn 256; ulimit -Hn {self.descriptors}; exec "$@"', "sh"]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [*limited, sys.executable, "-m", "service", "serve", "--port=0", f"--state-dir={home / 'state'}",
                 f"--input-root={home}", f"--output-root={home / 'runs'}", "--ray-address=http://127.0.0.1:9",
                 "--requests-per-minute=100000"],
                stdout=output, stderr=output,
                env={**os.environ, "XDG_CONFIG_HOME": str(home / "config"), "MOEDISCO_TOKEN": ""})
        self.place, self.authorization = ("127.0.0.1", 0), ""

    def start(self, home):
        """Wait until it listens."""
        address = home / "config" / "moedisco" / "service.json"
        self.until(lambda: address.exists() and b"startup complete" in self.log.read_bytes())
        saved = json.loads(address.read_text())
        self.place = ("127.0.0.1", urlsplit(saved["url"]).port)
        self.authorization = f"Bearer {saved['token']}"

    def until(self, happened):
        deadline = time.monotonic() + 60
        while not happened():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def ask(self, method, path, body=None, timeout=10.0):
        """A request of its own connection: status and body."""
        with contextlib.closing(http.client.HTTPConnection(*self.place, timeout=timeout)) as connection:
            headers = {"Authorization": self.authorization, "Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def hold(self, stack, count, first=b""):
        """Open connections and send something on each."""
        opened = [stack.enter_context(socket.create_connection(self.place, 10)) for _ in range(count)]
        for each in opened:
            with contextlib.suppress(ConnectionError):
                each.sendall(first)
        return opened

    @contextlib.contextmanager
    def others_are_served(self):
        """Ask on new connections while the block runs, and once behind it; every answer is right and takes less than a second."""
        found, over, logged = [], threading.Event(), self.log.stat().st_size

        def once():
            wall, computed = time.monotonic(), self.computed()
            try:
                status = self.ask("GET", "/v1/identity")[0]
            except OSError as error:
                status = repr(error)
            found.append((status, time.monotonic() - wall, self.computed() - computed))

        def keep_asking():
            while not over.wait(0.05):
                once()

        other = threading.Thread(target=keep_asking)
        other.start()
        try:
            yield
        finally:
            over.set()
            other.join()
        once()
        assert len(found) > 1
        statuses, walls, computed_meanwhile = zip(*found, strict=True)
        assert set(statuses) == {200}
        # Where others use the machine, a clock on the wall measures them too.
        busy = os.getloadavg()[0] > (os.cpu_count() or 1)
        assert max(computed_meanwhile if busy else walls) < LONGEST_ANSWER
        assert self.log.stat().st_size - logged < LOG_BYTES

    def computed(self):
        """Seconds of processor time that the service has used."""
        spent = psutil.Process(self.process.pid).cpu_times()
        return spent.user + spent.system

    def close(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)


@pytest.fixture(scope="module", params=[
    pytest.param(512, id="512 descriptors"), pytest.param(None, id="all descriptors", marks=pytest.mark.slow)])
def target(request, tmp_path_factory):
    raise_descriptor_limit()
    home = tmp_path_factory.mktemp("held")
    found = Target(home, request.param)
    try:
        found.start(home)
        yield found
    finally:
        found.close()


def test_three_thousand_idle_sockets_do_not_block_others(target):
    with contextlib.ExitStack() as stack, target.others_are_served():
        target.hold(stack, 3000)
        time.sleep(1.5)


def test_heads_and_bodies_that_trickle_in_do_not_block_others(target):
    body = b"POST /v1/session HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    with contextlib.ExitStack() as stack, target.others_are_served():
        held = target.hold(stack, 400, b"GET / HTTP/1.1\r\n") + target.hold(stack, 400, body)
        for _ in range(10):
            time.sleep(0.1)
            for each in held:
                with contextlib.suppress(ConnectionError):
                    each.send(b"x")


def test_streams_of_one_token_are_limited_with_a_clear_answer(target):
    status, body = target.ask("POST", "/v1/runs", {"config": demo()})
    assert status == 201
    events = f"/v1/runs/{json.loads(body)['id']}/events"
    head = f"GET {events} HTTP/1.1\r\nHost: x\r\nAuthorization: {target.authorization}\r\n\r\n".encode()
    answers = []
    with contextlib.ExitStack() as stack, target.others_are_served():
        for _ in range(22):
            answers += [_status(each) for each in target.hold(stack, 50, head)]
        status, body = target.ask("GET", events)
    expected = min(STREAMS_OF_A_TOKEN, capacity(target.descriptors).streams)
    assert {each: answers.count(each) for each in answers} == {200: expected, 429: 1100 - expected}
    assert (status, "streams and downloads" in json.loads(body)["detail"]) == (429, True)
    target.until(lambda: target.ask("GET", f"{events}?follow=false")[0] == 200)     # their places are free again


def test_bodies_of_a_megabyte_do_not_block_others(target):
    large = json.dumps({"config": {"name": 1_000_000 * "x"}}).encode()
    lines = "POST /v1/estimates HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(large)}"
    strange, own = (
        "\r\n".join([*lines, f"Authorization: {proof}", "\r\n"]).encode() + large for proof in ("", target.authorization))
    with contextlib.ExitStack() as stack, target.others_are_served():
        assert {_status(each) for each in target.hold(stack, 10, strange)} == {401}
        assert {_status(each) for each in target.hold(stack, 10, own)} == {422}
        target.hold(stack, 100, own[:-1])
        time.sleep(0.5)


def test_a_large_body_of_a_stranger_is_not_read(target):
    begun = "POST /v1/estimates HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{}\r\n\r\n"
    announced = begun.format("Content-Length: 1000000").encode()
    chunked = begun.format("Transfer-Encoding: chunked").encode() + b"10001\r\n" + 0x10001 * b" " + b"\r\n"
    report = announced.replace(b"/v1/estimates", b"/v1/runs/01ARZ3NDEKTSV4RRFFQ69G5FAV/report")
    with contextlib.ExitStack() as stack:
        for head in (announced, chunked, report):
            assert {_status(each) for each in target.hold(stack, 10, head)} == {401}


def test_the_soft_limit_on_files_is_raised_to_the_hard_one(target):
    assert resource.prlimit(target.process.pid, resource.RLIMIT_NOFILE) == (target.descriptors, target.descriptors)


def _status(connection):
    """Of the answer, which comes within the connection's timeout."""
    return int(connection.recv(65536).split(b" ", 2)[1])
