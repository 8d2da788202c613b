"""A Ray cluster on this machine that the service starts and that outlives it.

STATE_DIR/ray/           readable by the service's user only
├── cluster.json         mark, pid and ports of the cluster
├── auth_token           token for its REST API (with a drivers' user, in that user's directory)
├── ray.log              output of `ray start`
└── tmp/session_*/       Ray's own files

The cluster's processes carry a random mark in their environment. Only processes with this mark are ever signalled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from moedisco_ray.core.store.artifacts import read_json, write_json
from service.driver_user import DriverUser
from service.errors import RayUnavailable
from service.observability import logger
from service.ray_side.answers import NodeList, read_as
from service.ray_side.dashboard import Dashboard

MARK = "MOEDISCO_LOCAL_RAY"
"""Environment variable with the random mark that identifies the cluster's processes."""
START_SECONDS = 90.0
"""Maximum wait until a new cluster answers, in seconds."""
START_PAUSES = (2.0, 10.0)
"""Pauses before a further start (s): on a busy machine, Ray gives up when one of its processes takes longer than 15
s."""
TERM_SECONDS = 5.0
"""Maximum wait until processes have ended, in seconds."""
LONGEST_DIRECTORY = 36
"""Maximum length of the path of Ray's directory: sockets in it add up to 71 characters, and a socket's path has at most
107."""
SESSIONS_KEPT = 3


@dataclasses.dataclass(frozen=True)
class LocalCluster:
    """A running local cluster.

    Attributes:
        dashboard_url: URL of its dashboard on the loopback interface, which accepts jobs.
        address: RAY_ADDRESS for a driver on this machine.
        token_path: File with the token.
    """

    dashboard_url: str
    address: str
    token_path: Path


@dataclasses.dataclass(frozen=True)
class _Record:
    mark: str
    pid: int | None
    dashboard_port: int
    gcs_port: int
    directory: str
    user: str | None = None


class LocalRay:
    """Starts, finds and stops the local cluster.

    Args:
        state_dir: State directory of the service.
        resources: Slots by pool tag; None gives both default pools a slot per GPU, or per core without GPUs.
        cpus: CPUs of the cluster; None uses all.
        object_store_bytes: Size of the object store; None uses Ray's default.
        user: User that runs the cluster and its drivers; None uses this process's user.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        resources: Mapping[str, int] | None = None,
        cpus: int | None = None,
        object_store_bytes: int | None = None,
        user: DriverUser | None = None,
    ) -> None:
        self._home = state_dir / "ray"
        self._resources = default_resources() if resources is None else dict(resources)
        self._cpus = cpus
        self._object_store_bytes = object_store_bytes
        self._user = user
        self._log = logger("service.ray")

    def start(self) -> LocalCluster:
        """Return the running cluster, or start a new one and wait until it answers.

        Raises:
            RayUnavailable: The cluster did not start; the message names its log.
        """
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._locked():
            found = self.find()
            before = self._record()
            same_user = before is not None and before.user == self._user_name
            if found is not None and same_user and self._answers(found, START_SECONDS):
                return found
            self._end()
            self._forget_old_sessions()
            # Reuse the old ports, so that drivers and browsers find the new cluster.
            ports = (before.dashboard_port, before.gcs_port) if before is not None else ()
            for pause in START_PAUSES:
                try:
                    return self._launch(ports if ports and all(map(_is_free, ports)) else _free_ports(2))
                except RayUnavailable as error:
                    self._log.warning("ray.start_failed", error=str(error), again_in_seconds=pause)
                time.sleep(pause)
            return self._launch(_free_ports(2))

    def ensure_running(self, dashboard: Dashboard, now: float) -> None:
        """Restart the cluster if its head process has died; called by a `background.loop`.

        Args:
            dashboard: The service's client of the cluster. It gets the new token, and the new URL if the old port is
                used by now.
            now: Ignored.

        Raises:
            RayUnavailable: The cluster did not start.
        """
        del now
        if self.find() is None:
            cluster = self.start()
            dashboard.move(cluster.dashboard_url, cluster.token_path)

    def find(self) -> LocalCluster | None:
        """The recorded cluster, if its head process is alive."""
        record = self._record()
        if record is None or record.pid is None or not _bears(record.pid, record.mark):
            return None
        return self._cluster(record)

    def stop(self) -> None:
        """Stop the cluster and every process that it started, if it runs."""
        if self._home.exists():
            with self._locked():
                self._end()

    def _launch(self, ports: Sequence[int]) -> LocalCluster:
        # Ray makes its directory readable for all users, so it needs a private parent that the cluster's user can
        # enter. The name begins with a dot, because runs read no hidden folder below an input root, such as `/` or
        # `/tmp`.
        fits = self._user is None and len(str(self._sessions)) <= LONGEST_DIRECTORY
        directory = self._sessions if fits else Path(tempfile.mkdtemp(prefix=".moedisco-"), "r")
        dashboard_port, gcs_port = ports
        record = _Record(
            secrets.token_hex(16),
            pid=None,
            dashboard_port=dashboard_port,
            gcs_port=gcs_port,
            directory=str(directory),
            user=self._user_name,
        )
        token_path = self._token_path(record)
        _write_secret(token_path, secrets.token_hex(32))
        if self._user is not None:
            self._user.give(token_path)
            self._user.give(directory.parent)
        # Write the record before the process starts, so that the processes of a half-started cluster can be identified.
        self._write(record)
        pid = self._spawn(record, token_path)
        await_environment(pid)
        record = dataclasses.replace(record, pid=pid)
        self._write(record)
        cluster = self._cluster(record)
        if not self._answers(cluster, START_SECONDS):
            self._end()
            raise RayUnavailable(f"the local Ray cluster did not start; see {self._home / 'ray.log'}")
        return cluster

    def _spawn(self, record: _Record, token_path: Path) -> int:
        words = [
            sys.executable,
            "-P",
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--port={record.gcs_port}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={record.dashboard_port}",
            # With Ray's fixed default ports, two clusters could not run on one machine.
            "--dashboard-agent-listen-port=0",
            f"--ray-client-server-port={_free_ports(1)[0]}",
            f"--temp-dir={record.directory}",
            f"--resources={json.dumps(self._resources)}",
            "--disable-usage-stats",
            "--log-style=record",
            "--log-color=false",
        ]
        if self._cpus is not None:
            words.append(f"--num-cpus={self._cpus}")
        if self._object_store_bytes is not None:
            words.append(f"--object-store-memory={self._object_store_bytes}")
        # Drivers inherit the environment, and MOEDISCO_* may contain the database password.
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN") and not name.startswith("MOEDISCO_")
        }
        if self._user is not None:
            own = Path(record.directory).parent
            words, environment = self._user.command(words, own), self._user.environment(environment, own)
        environment |= {
            MARK: record.mark,
            # As on macOS and Windows, all processes listen on 127.0.0.1 alone. Ray ignores a --node-ip-address of
            # 127.0.0.1.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_path),
            # Drivers start as `python`, which must be this interpreter with its packages.
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
        }
        log = str(self._home / "ray.log")
        return os.posix_spawn(
            words[0],
            words,
            environment,
            setsid=True,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
        )

    def _end(self) -> None:
        record = self._record()
        if record is None:
            return
        # First stop the head process, which stops its children; then kill what remains, such as drivers and orphaned
        # workers.
        if record.pid is not None and _bears(record.pid, record.mark):
            _signal([psutil.Process(record.pid)], kill=False, seconds=TERM_SECONDS)
        deadline = time.monotonic() + TERM_SECONDS
        while remaining := _bearers(record.mark):
            _signal(remaining, kill=True, seconds=2)
            if time.monotonic() > deadline:
                raise RayUnavailable(
                    f"processes of the local Ray cluster do not end: {', '.join(str(p.pid) for p in remaining)}"
                )
        if Path(record.directory) != self._sessions:
            shutil.rmtree(Path(record.directory).parent, ignore_errors=True)
        self._record_path.unlink(missing_ok=True)

    def _answers(self, cluster: LocalCluster, seconds: float) -> bool:
        dashboard = Dashboard(cluster.dashboard_url, cluster.token_path)
        deadline = time.monotonic() + seconds
        with contextlib.closing(dashboard):
            while time.monotonic() < deadline and self.find() is not None:
                with contextlib.suppress(RayUnavailable):
                    nodes = read_as(NodeList, dashboard.get("/api/v0/nodes")).items
                    if any(node.alive for node in nodes):  # the dashboard answers before the node is up
                        return True
                time.sleep(0.2)
        return False

    def _forget_old_sessions(self) -> None:
        sessions = sorted(path for path in self._sessions.glob("session_*") if not path.is_symlink())
        for path in sessions[:-SESSIONS_KEPT]:
            shutil.rmtree(path, ignore_errors=True)

    @property
    def _sessions(self) -> Path:
        return self._home / "tmp"

    @property
    def _record_path(self) -> Path:
        return self._home / "cluster.json"

    def _record(self) -> _Record | None:
        try:
            return _Record(**read_json(self._record_path))
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, record: _Record) -> None:
        write_json(self._record_path, dataclasses.asdict(record))

    def _cluster(self, record: _Record) -> LocalCluster:
        return LocalCluster(
            f"http://127.0.0.1:{record.dashboard_port}", f"127.0.0.1:{record.gcs_port}", self._token_path(record)
        )

    def _token_path(self, record: _Record) -> Path:
        return (self._home if record.user is None else Path(record.directory).parent) / "auth_token"

    @property
    def _user_name(self) -> str | None:
        return None if self._user is None else self._user.name

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._home / "lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def default_resources() -> dict[str, int]:
    """Slots of the default pools on this machine: one per GPU, or per core without GPUs."""
    gpus = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    slots = gpus or os.cpu_count() or 1
    return {"low_mem_gpu": slots, "high_mem_gpu": slots}


def _bears(pid: int, mark: str) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except psutil.Error:
        return False


def await_environment(pid: int) -> None:
    """Wait until the environment of a new process can be read; while it is empty, the mark would not be found."""
    with contextlib.suppress(psutil.Error):
        while not (process := psutil.Process(pid)).environ() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.001)


def _bearers(mark: str) -> list[psutil.Process]:
    return [psutil.Process(pid) for pid in psutil.pids() if _bears(pid, mark)]


def _signal(processes: list[psutil.Process], *, kill: bool, seconds: float) -> None:
    """Signal processes and wait until they end; psutil skips a pid that was reused by another process."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill() if kill else process.terminate()
    psutil.wait_procs(processes, timeout=seconds)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _write_secret(path: Path, secret: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(secret)
