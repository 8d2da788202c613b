from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from ray.dashboard.subprocesses.module import SubprocessModule
from ray.dashboard.subprocesses.utils import get_socket_path
from ray.dashboard.utils import get_all_modules

from moedisco_ray.core.store.read_roots import ReadRoots, check_inside, reading_within
from service.domain.jobs import JobPhase
from service.driver_user import DriverUser
from service.errors import RayUnavailable
from service.ray_side import local
from service.ray_side.dashboard import Dashboard
from service.ray_side.jobs import RayJobs, Submission
from service.ray_side.local import MARK, LocalRay
from service.ray_side.pages import RayPages
from service.ray_side.pools import RayPools

DRIVER = """\
import os, pathlib, sys, time
import ray
ray.init(log_to_driver=False)
ray.get(ray.util.placement_group([{"low_mem_gpu": 1}]).ready())
pathlib.Path(sys.argv[1]).write_text(os.environ["MOEDISCO_READ_ROOTS"])
time.sleep(600)
"""


def tiny(state_dir: Path) -> LocalRay:
    return LocalRay(state_dir, resources={"low_mem_gpu": 2, "high_mem_gpu": 1}, cpus=1, object_store_bytes=80_000_000)


def processes(state_dir: Path) -> list[int]:
    """Pids of all processes of a directory's Ray cluster, found by arguments that only they have."""
    needle = f"{state_dir / 'ray' / 'auth_token'}"
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_AUTH_TOKEN_PATH") == needle and MARK in process.environ():
                found.append(process.pid)
    return found


def note(state_dir: Path, mark: str, pid: int | None) -> None:
    """As an earlier service left it."""
    home = state_dir / "ray"
    home.mkdir()
    record = {"mark": mark, "pid": pid, "dashboard_port": 1, "gcs_port": 2, "directory": str(home / "tmp")}
    (home / "cluster.json").write_text(json.dumps(record))


def eventually(true: Callable[[], bool], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    tiny(tmp_path).stop()


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_outlives_its_service_is_taken_up_again_and_leaves_nothing(state_dir, monkeypatch):
    """One life of a cluster, on which jobs and pools are looked at too: starting it takes most of the time."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of another cluster: not ours to use
    start = "import sys, pathlib, test_local_ray as t; print(t.tiny(pathlib.Path(sys.argv[1])).start().dashboard_url)"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    service = subprocess.run(
        [sys.executable, "-c", start, str(state_dir)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )

    found = tiny(state_dir).start()
    assert found.dashboard_url == service.stdout.strip(), "another one was started"
    assert httpx.get(f"{found.dashboard_url}/api/jobs/", trust_env=False).status_code == 401
    assert stat.S_IMODE(found.token_path.stat().st_mode) == 0o600
    assert stat.S_IMODE((state_dir / "ray").stat().st_mode) == 0o700

    with contextlib.closing(Dashboard(found.dashboard_url, found.token_path)) as dashboard:
        _jobs_run_and_end(
            RayJobs(dashboard), RayPools(dashboard), state_dir, lambda: _pages_are_shown(dashboard, found.token_path)
        )
    _refused_without_the_token(found.dashboard_url, state_dir)

    os.kill(json.loads((state_dir / "ray" / "cluster.json").read_text())["pid"], signal.SIGKILL)
    eventually(lambda: tiny(state_dir).find() is None)  # a killed process of many threads takes its time
    with contextlib.closing(Dashboard(found.dashboard_url, found.token_path)) as dashboard:
        tiny(state_dir).ensure_running(dashboard, 0.0)
        assert tiny(state_dir).find() == found, "it came back elsewhere"
        assert RayJobs(dashboard).statuses() == {}

    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "raylet gcs_server"])
    tiny(state_dir).stop()
    assert processes(state_dir) == []
    assert tiny(state_dir).find() is None
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    with contextlib.closing(Dashboard(found.dashboard_url)) as gone, pytest.raises(RayUnavailable):
        RayJobs(gone).statuses()


def _pages_are_shown(dashboard: Dashboard, token_path: Path) -> None:
    """What the pages of this Ray load, read as the service passes it on."""

    async def read(path: str) -> tuple[int, str]:
        async with RayPages(dashboard).open("GET", path, "", {}) as page:
            return page.status, b"".join([block async for block in page.body]).decode()

    status, index = asyncio.run(read(""))
    assert status == 200
    [script] = re.findall(r'src="\./(static/js/main\.[^"]+\.js)"', index)
    _, code = asyncio.run(read(script))
    # The script's own list of what it asks for: a Ray that moves a page's data is noticed here.
    for path in ("api/jobs/", "api/v0/tasks", "logical/actors", "api/cluster_status", "api/v0/placement_groups"):
        assert path in code
        assert asyncio.run(read(path))[0] == 200, path
    _, shown = asyncio.run(read("api/jobs/"))
    assert "R-1" in shown
    assert token_path.read_text() not in index + code + shown


def _jobs_run_and_end(jobs: RayJobs, pools: RayPools, directory: Path, meanwhile: Callable[[], None]) -> None:
    there = {pool.resource: pool for pool in pools.read(["rare"]).items}
    assert {name: pool.slots for name, pool in there.items()} == {"low_mem_gpu": 2, "high_mem_gpu": 1, "rare": 0}
    assert not pools.grows()
    proof = directory / "proof"
    driver = directory / "driver.py"
    driver.write_text(DRIVER)
    submission = Submission("R-1", "R", proof, directory / "stop", directory / "report-to")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.ray_side.jobs.entrypoint", lambda it, python: f"exec {python} {driver} {it.config_path}")
        jobs.submit(submission)
        jobs.submit(submission)
    assert list(jobs.statuses()) == ["R-1"]
    eventually(proof.exists)
    assert proof.read_text() == submission.read_roots.to_json()
    assert jobs.statuses()["R-1"].phase is JobPhase.RUNNING
    meanwhile()
    eventually(lambda: next(pool.free for pool in pools.read().items if pool.resource == "low_mem_gpu") == 1)
    with pytest.raises(RayUnavailable, match="non-terminal"):
        jobs.delete("R-1")
    jobs.kill("R-1")
    eventually(lambda: jobs.statuses()["R-1"].phase is JobPhase.STOPPED)
    jobs.kill("R-1")
    jobs.kill("S-1")
    jobs.delete("R-1")
    eventually(lambda: _forgotten(jobs, "R-1"))


def _forgotten(jobs: RayJobs, name: str) -> bool:
    """Whether a job is unknown after its deletion.

    Ray checks a job's process once per second. If the job is deleted between its end and this check, Ray takes the
    missing process for a failure and writes the job anew.
    """
    jobs.delete(name)
    return name not in jobs.statuses()


def _refused_without_the_token(url: str, directory: Path) -> None:
    (directory / "wrong").write_text("0" * 64)
    for token in (directory / "wrong", directory / "absent"):
        with (
            contextlib.closing(Dashboard(url, token)) as stranger,
            pytest.raises(RayUnavailable, match="refuses the token"),
        ):
            RayJobs(stranger).statuses()


def test_a_process_whose_environment_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = [{}, {}, {MARK: "ours"}]

    class Spawned:
        def __init__(self, pid: int) -> None:
            self.pid = pid

        def environ(self) -> dict[str, str]:
            return environments.pop(0)

        def status(self) -> str:
            return psutil.STATUS_RUNNING

    monkeypatch.setattr(local.psutil, "Process", Spawned)
    local.await_environment(1)
    assert environments == []


def test_a_process_that_ended_at_once_is_not_waited_for() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    local.await_environment(ended.pid)  # a zombie
    ended.wait()
    local.await_environment(ended.pid)  # nobody


def test_the_services_client_follows_a_cluster_that_starts_again_with_another_token(tmp_path, monkeypatch):
    alive: list[int] = []
    monkeypatch.setattr(LocalRay, "_spawn", lambda *_: alive.append(-1 - len(alive)) or alive[-1])
    monkeypatch.setattr(LocalRay, "_answers", lambda *_: True)
    monkeypatch.setattr(local, "await_environment", lambda _pid: None)
    monkeypatch.setattr(local, "_bears", lambda pid, _mark: pid == alive[-1])
    cluster = LocalRay(tmp_path, user=DriverUser("driver", os.getuid(), os.getgid(), tmp_path, "setpriv"))

    def answer(request: httpx.Request) -> httpx.Response:
        now = cluster.find()
        assert str(request.url).startswith(now.dashboard_url)
        known = request.headers["authorization"] == "Bearer " + now.token_path.read_text()
        return httpx.Response(200 if known else 401, json=[])

    first = cluster.start()
    with contextlib.closing(Dashboard(first.dashboard_url, first.token_path, httpx.MockTransport(answer))) as dashboard:
        assert RayJobs(dashboard).statuses() == {}
        cluster.ensure_running(dashboard, 0.0)
        assert cluster.find() == first
        alive.append(0)  # the head dies, and another program takes its port
        monkeypatch.setattr(local, "_is_free", lambda _port: False)
        cluster.ensure_running(dashboard, 0.0)
        assert not first.token_path.exists()
        assert RayJobs(dashboard).statuses() == {}
        assert dashboard.url != first.dashboard_url
    alive.append(0)
    cluster.stop()


@pytest.mark.slow
@pytest.mark.ray
def test_a_failed_start_names_its_log_and_leaves_nothing(state_dir, monkeypatch):
    monkeypatch.setattr(local, "START_PAUSES", (0.0,))
    broken = LocalRay(state_dir, resources={"CPU": 1})
    with pytest.raises(RayUnavailable, match=r"see .*ray\.log"):
        broken.start()
    assert (state_dir / "ray" / "ray.log").read_text()
    assert processes(state_dir) == []
    assert broken.find() is None


def test_no_run_reads_the_directory_that_a_cluster_has_where_paths_of_sockets_are_short(tmp_path, monkeypatch):
    """Before: it was /tmp/moedisco-*, which a run below an input root such as / or /tmp could read."""

    def spawned(_cluster, record, _token):
        raise RuntimeError(record.directory)

    monkeypatch.setattr(LocalRay, "_spawn", spawned)
    with pytest.raises(RuntimeError) as caught:
        LocalRay(tmp_path / ("a" * local.LONGEST_DIRECTORY)).start()
    directory = Path(str(caught.value))
    try:
        for root in (Path("/"), Path(tempfile.gettempdir())):
            with reading_within(ReadRoots([root])), pytest.raises(OSError, match="leads out"):
                check_inside(directory / "session_latest" / "logs" / "gcs_server.out")
    finally:
        directory.parent.rmdir()


def test_a_pid_that_has_gone_to_another_process_is_not_touched(state_dir):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    note(state_dir, "0" * 32, stranger.pid)
    ray = tiny(state_dir)
    assert ray.find() is None
    ray.stop()
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_marked_processes_are_ended_even_if_they_ignore_sigterm_and_their_pid_is_unknown(state_dir):
    """As a worker does whose raylet was killed, or a head whose service died before it could note the pid."""
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    )
    orphan = subprocess.Popen(
        [sys.executable, "-c", stubborn],
        env=os.environ | {MARK: "1" * 32},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    orphan.stdout.readline()
    note(state_dir, "1" * 32, None)
    tiny(state_dir).stop()
    orphan.stdout.close()
    assert orphan.wait(5) in (-signal.SIGKILL, 0)
    assert not (state_dir / "ray" / "cluster.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"mark": 1}'])
def test_a_record_that_cannot_be_read_is_none(state_dir, content):
    (state_dir / "ray").mkdir()
    (state_dir / "ray" / "cluster.json").write_text(content)
    assert tiny(state_dir).find() is None
    tiny(state_dir).stop()


def test_without_a_cluster_there_is_nothing_to_stop(tmp_path):
    tiny(tmp_path).stop()
    assert list(tmp_path.iterdir()) == []


def test_a_machine_offers_a_slot_per_gpu_or_per_core():
    low, high = local.default_resources().values()
    assert low == high >= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what Ray's dashboard imports
def test_the_paths_of_rays_sockets_fit_below_the_longest_directory():
    """Before (af276e38): a socket's path in /home/ubuntu had 110 characters: `moedisco serve` could not start Ray."""
    names = [module.__name__ for module in get_all_modules(SubprocessModule)]
    session = "session_2026-11-30_21-31-48_025731_4194304"  # the number is a pid
    assert max(names, key=len) == "TaskEventsHead"
    for name in names:
        get_socket_path(f"/{'d' * (local.LONGEST_DIRECTORY - 1)}/{session}/sockets", name)  # raises if it is too long
