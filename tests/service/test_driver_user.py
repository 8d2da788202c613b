"""Drivers as another user of the operating system: they reach their run's directory, and nothing of the service's."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_jobs import FakeJobs
from reconciling import Scene

from moedisco_ray.core.errors import ConfigError
from service.background.launching import Launcher
from service.database import runs
from service.database.session import Database
from service.driver_user import DriverUser
from service.ray_side.dashboard import Dashboard
from service.ray_side.jobs import RayJobs, Submission
from service.ray_side.local import LocalRay
from service.serve import serve
from service.settings import Settings

NAME = "nobody"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start programs as another user")
DRIVER = """
import json, os, pathlib, sys
import ray

def tried(path):
    try:
        pathlib.Path(path).read_bytes()
    except OSError as error:
        return type(error).__name__
    return "read"

@ray.remote(num_cpus=0)
def look(paths):
    return {"uid": os.getuid(), "groups": os.getgroups(), "tried": [tried(path) for path in paths],
            "settings": [name for name in os.environ if name.startswith("MOEDISCO_") and "LOCAL_RAY" not in name],
            "gains rights": "NoNewPrivs:\\t0" in pathlib.Path("/proc/self/status").read_text()}

ray.init(log_to_driver=False)
said = {"driver": look._function(sys.argv[2:]), "worker": ray.get(look.remote(sys.argv[2:]))}
draft = pathlib.Path(sys.argv[1] + ".draft")
draft.write_text(json.dumps(said))
draft.rename(sys.argv[1])
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that every user can pass through, unlike pytest's own."""
    home = Path(tempfile.mkdtemp(prefix="moe-"))
    home.chmod(0o755)
    yield home
    shutil.rmtree(home)


def test_a_user_that_cannot_be_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"^--driver-user: 'no-such-user': is no user of this machine; create it first"
    ):
        DriverUser.named("no-such-user")
    with pytest.raises(ConfigError, match=r"^--driver-user: 'root': is root; name an unprivileged user"):
        DriverUser.named("root")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ConfigError, match=r"^--driver-user: 'nobody': needs a service that was started as root"):
        DriverUser.named(NAME)


@as_root
def test_a_cluster_has_a_user_of_its_own(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, port=0, ray_address="http://127.0.0.1:9", driver_user=NAME)
    with pytest.raises(ConfigError, match=r"^--driver-user: 'nobody': works only with a local Ray"):
        serve(settings, lambda _announcement: None)


@as_root
def test_a_run_directory_is_the_drivers_and_what_the_service_writes_is_not(home: Path) -> None:
    with contextlib.closing(Database(f"sqlite:///{home / 'state' / 'service.sqlite3'}")) as database:
        database.migrate()
        scene = Scene.on(database, home, driver_user=NAME)
        run_id = scene.submit()
        with database.read() as session:
            run = runs.get(session, run_id)
    assert run is not None
    before = os.umask(0o077)
    try:
        launcher = Launcher(FakeJobs(), scene.settings, b"secret", lambda _run: None, lambda _run: ())
        launcher.launch(run)
        launcher.request_stop(run)
    finally:
        os.umask(before)
    user, directory = pwd.getpwnam(NAME), Path(run.directory)
    assert directory.stat().st_uid == user.pw_uid
    for path, mode in (
        (directory.parent, 0o750),
        (directory.parent / "request.json", 0o640),
        (directory.parent / "stop-0", 0o640),
        (directory.parent / "report-to-0", 0o640),
    ):
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, user.pw_gid, mode), path


@as_root
def test_an_interpreter_that_the_user_cannot_run_is_found_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(
        ConfigError, match=r"^--driver-user: 'nobody': cannot run .*/python with this package; install both where"
    ):
        DriverUser.named(NAME).check()


@as_root
@pytest.mark.ray
def test_drivers_and_workers_cannot_read_what_the_service_keeps(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDISCO_DATABASE_URL", "postgresql+psycopg://user:password@host/db")
    state, run, secrets = home / "state", home / "run", []
    state.mkdir(mode=0o700)
    for name in ("service.sqlite3", "secret", "admin-token"):
        secrets.append(state / name)
        secrets[-1].write_text("a secret")  # as if its own mode did not close it
        secrets[-1].chmod(0o644)
    user = DriverUser.named(NAME)
    try:
        user.check()
    except ConfigError as error:
        pytest.skip(str(error))
    run.mkdir()
    user.give(run)
    (home / "driver.py").write_text(DRIVER)
    local = LocalRay(state, resources={"low_mem_gpu": 1}, cpus=1, object_store_bytes=80_000_000, user=user)
    try:
        found = local.start()
        assert LocalRay(state, user=user).find() == found
        with contextlib.closing(Dashboard(found.dashboard_url, found.token_path)) as dashboard:
            words = " ".join(map(str, [home / "driver.py", run / "said", *secrets, state / "ray" / "cluster.json"]))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("service.ray_side.jobs.entrypoint", lambda _submission, python: f"exec {python} {words}")
                RayJobs(dashboard).submit(Submission("R-1", "R", run / "request.json", run / "stop", run / "report-to"))
            deadline = time.monotonic() + 60
            while not (run / "said").exists():
                assert time.monotonic() < deadline, RayJobs(dashboard).statuses()
                time.sleep(0.1)
        assert found.token_path.stat().st_uid == user.uid
        assert stat.S_IMODE(found.token_path.stat().st_mode) == 0o600
    finally:
        local.stop()
    said = json.loads((run / "said").read_text())
    for who in ("driver", "worker"):
        assert "MOEDISCO_DATABASE_URL" not in said[who].pop("settings")
        assert said[who] == {
            "uid": user.uid,
            "groups": [user.gid],
            "tried": 4 * ["PermissionError"],
            "gains rights": False,
        }
    assert not found.token_path.parent.exists()
