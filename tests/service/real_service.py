"""The service as users start it, with a local Ray of its own, in processes that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from service.client import Client, RetryPolicy
from service.ray_side.local import LocalRay

START_SECONDS = 150
INPUT_ROOT = Path(os.__file__).parent


class RealService:
    """`moedisco serve` on a port that stays the same over restarts, unless it moves.

    Args:
        home: Directory for all its files.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.move()
        self._process: subprocess.Popen[bytes] | None = None
        self.output = home / "serve.log"

    def move(self) -> None:
        """Take another port at the next start; clients follow."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self.spawn()
        self.wait_until_listening()

    def spawn(self) -> None:
        """Start it."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MOEDISCO_"))}
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "service",
                    "serve",
                    f"--port={self.port}",
                    f"--state-dir={self.home / 'state'}",
                    f"--output-root={self.home / 'runs'}",
                    f"--input-root={INPUT_ROOT}",
                ],
                stdout=output,
                stderr=output,
                env={**environment, "XDG_CONFIG_HOME": str(self.home / "config")},
            )

    def wait_until_listening(self) -> None:
        """Once it was started."""
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while not self._listens():
            assert self._process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """As a lost machine ends it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """As Ctrl-C ends it; the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(60)

    def close(self) -> None:
        """End whatever is left, Ray included."""
        if self._process is not None and self._process.poll() is None:
            self.stop()
        LocalRay(self.home / "state").stop()

    def client(self) -> Client:
        """With the first token."""
        address = json.loads((self.home / "config" / "moedisco" / "service.json").read_text())
        return Client(address["url"], address["token"], retry=RetryPolicy(seconds=120), transport=_PresentPort(self))

    @property
    def pid(self) -> int:
        """Of the service's process."""
        assert self._process is not None
        return self._process.pid

    def drivers(self, run_id: str) -> list[psutil.Process]:
        """The processes that drive a run."""
        return [process for process in psutil.process_iter() if _drives(process, run_id)]

    def _listens(self) -> bool:
        if not (self.home / "config" / "moedisco" / "service.json").exists():
            return False
        with socket.socket() as trial:
            return trial.connect_ex(("127.0.0.1", self.port)) == 0


class _PresentPort(httpx.AsyncHTTPTransport):
    def __init__(self, service: RealService) -> None:
        super().__init__()
        self._service = service

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(port=self._service.port)
        return await super().handle_async_request(request)


@contextlib.contextmanager
def real_service(home: Path) -> Iterator[RealService]:
    """One that listens, and leaves nothing behind."""
    running = RealService(home)
    try:
        running.start()
        yield running
    finally:
        running.close()


def _drives(process: psutil.Process, run_id: str) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return "moedisco_ray" in words and any(run_id in word for word in words)
