"""A Ray behind a port that starts no drivers: the dashboard's answers about the jobs and pools of `fake_jobs`."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fake_jobs import FakeJobs

from service.ray_side.jobs import Submission

SLOTS = {"low_mem_gpu": 100.0, "high_mem_gpu": 100.0}


class RayStandin(ThreadingHTTPServer):
    """Jobs that live in memory; a submission takes `pause` seconds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.jobs = FakeJobs()
        self.pause = 0.0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: RayStandin

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        node = {"node_id": "n", "node_ip": "127.0.0.1", "state": "ALIVE", "resources_total": SLOTS, "labels": {}}
        found: dict[str, Any] = {
            "/api/v0/nodes": {"data": {"result": {"result": [node]}}},
            "/api/v0/placement_groups": {"data": {"result": {"result": []}}},
            "/nodes": {"data": {"summary": [], "nodeLogicalResources": {}}},
        }
        self._answer(found[path] if path in found else self._jobs())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        jobs = self.server.jobs
        with self.server.lock:
            if self.path != "/api/jobs/":
                jobs.kill(self.path.split("/")[-2])
                status = 200
            else:
                name = body["submission_id"]
                status = 500 if name in jobs.jobs else 200
                jobs.submit(Submission(name, name.partition("-")[0], *[None] * 3))  # type: ignore[arg-type]
        time.sleep(self.server.pause)
        self._answer({}, status)

    def _jobs(self) -> list[dict[str, Any]]:
        with self.server.lock:
            return [
                {"submission_id": name, "status": job.phase, "message": job.message, "driver_exit_code": job.exit_code}
                for name, job in self.server.jobs.jobs.items()
            ]

    def _answer(self, document: Any, status: int = 200) -> None:
        body = json.dumps(document).encode()
        with contextlib.suppress(OSError):  # the service was killed
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def ray_standin() -> Iterator[RayStandin]:
    """A stand-in that listens."""
    with RayStandin() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
