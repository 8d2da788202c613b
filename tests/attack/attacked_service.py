"""A real service process under attack, and another client that uses it meanwhile."""

import contextlib
import http.client
import itertools
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

LOG_BYTES = 100_000
LONGEST_ANSWER = 1.0
"""Seconds from a request to its answer."""


class Target:
    """A service process under attack, and another client that uses it."""

    def __init__(self, home: Path, descriptors: int | None = None) -> None:
        self.log = home / "serve.log"
        self.descriptors = descriptors or resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        # As a login shell has it: a low soft limit, which the service may raise to the hard one.
        limited = ["sh", "-c", f'ulimit -Sn 256; ulimit -Hn {self.descriptors}; exec "$@"', "sh"]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *limited,
                    sys.executable,
                    "-m",
                    "service",
                    "serve",
                    "--port=0",
                    f"--state-dir={home / 'state'}",
                    f"--input-root={home}",
                    f"--output-root={home / 'runs'}",
                    "--ray-address=http://127.0.0.1:9",
                    "--requests-per-minute=100000",
                ],
                stdout=output,
                stderr=output,
                env={**os.environ, "XDG_CONFIG_HOME": str(home / "config"), "MOEDISCO_TOKEN": ""},
            )
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

    def ask(self, method, path, body=None, timeout=10.0, token=None):
        """A request of its own connection, by the administrator or with another token: status and body."""
        with contextlib.closing(http.client.HTTPConnection(*self.place, timeout=timeout)) as connection:
            authorization = self.authorization if token is None else f"Bearer {token}"
            headers = {"Authorization": authorization, "Content-Type": "application/json"}
            connection.request(
                method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), headers
            )
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
    def others_are_served(self, requests=(("GET", "/v1/identity", None, None),)):
        """Ask on new connections during the block, and once after it; every answer is right and takes less than 1 s.

        Args:
            requests: Method, path, body and token of each request, which are sent in turn.
        """
        found, over, logged = [], threading.Event(), self.log.stat().st_size

        def once(method, path, body, token):
            wall, computed = time.monotonic(), self.computed()
            try:
                status = self.ask(method, path, body, token=token)[0]
            except OSError as error:
                status = repr(error)
            found.append((status, time.monotonic() - wall, self.computed() - computed))

        def keep_asking():
            turn = itertools.cycle(requests)
            while not over.wait(0.05):
                once(*next(turn))

        other = threading.Thread(target=keep_asking)
        other.start()
        try:
            yield
        finally:
            over.set()
            other.join()
        for request in requests:
            once(*request)
        assert len(found) > len(requests)
        statuses, walls, computed_meanwhile = zip(*found, strict=True)
        assert set(statuses) <= {200, 201}
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
