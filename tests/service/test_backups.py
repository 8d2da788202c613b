"""A backup, made while the service writes, restores into an empty database of either kind, or changes nothing."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import json
import re
import sqlite3
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from databases import T0, insert_run, whole_stream
from frozen_state import RUNS, put_state
from reconciling import FINISH, Scene
from sqlalchemy import select, text
from typer.testing import CliRunner

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.events import Event
from service import backup_archive, backups
from service.backups import back_up, restore
from service.bootstrap import first_token, service_secrets
from service.cli import app
from service.database import leases, snapshots
from service.database.session import Database
from service.database.table import Table
from service.process import locked

OTHER = {"sqlite": "postgresql", "postgresql": "sqlite"}


def everything(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """All rows, in one order; what is written about a backup itself is left out."""
    left_out = {"leases", "last_done"}
    with contextlib.closing(Database(url)) as database, database.read() as session:
        return {
            table.name: sorted(map(repr, session.execute(select(table)).all()))
            for table in Table.metadata.sorted_tables
            if table.name not in left_out
        }


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def scene(database: Database, tmp_path: Path, state: Path) -> Scene:
    """One run under way, with events and points, one queued; a token and the secrets."""
    scene = Scene.on(database, tmp_path)
    first_token(database, state / "admin-token")
    service_secrets(database, state)
    run_id = scene.running()
    scene.report(run_id, *(Event("progress", "submodels", "submodel-0", _step(step)) for step in range(1, 30)))
    scene.submit("bob", tags={"team": "grüße \u2028 語"})
    return scene


def _step(step: int) -> dict[str, Any]:
    return {"step": step, "steps": 100, "tokens": 10 * step, "loss": 1 / step, "lr": 1e-3, "tokens_per_second": 5.0}


def target(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if kind == "postgresql":
        return str(request.getfixturevalue("postgresql_url"))
    return f"sqlite:///{tmp_path / 'new' / 'service.sqlite3'}"


@pytest.mark.parametrize("same", [True, False])
def test_a_backup_restores_every_row_into_either_kind_of_database(
    scene: Scene, database_url: str, tmp_path: Path, state: Path, request: pytest.FixtureRequest, same: bool
):
    """The run under way loses its driver, as after a crash, and is started again by the restored service."""
    kind = scene.database.dialect if same else OTHER[scene.database.dialect]
    url, file, new = target(kind, tmp_path, request), tmp_path / "backup.tar.gz", tmp_path / "new"
    before = everything(database_url)
    made = back_up(database_url, state, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert (made.count("runs"), made.count("points"), made.database) == (2, 29, scene.database.dialect)
    assert restore(url, new, file)[1] == ["admin-token"]
    after = everything(url)
    assert after.pop("audit")[:-1] == before.pop("audit")
    assert after == before
    assert (new / "admin-token").read_text() == (state / "admin-token").read_text()
    with contextlib.closing(Database(url)) as database:
        assert service_secrets(database, new) == service_secrets(scene.database, state)
        restored = Scene.on(database, tmp_path)
        restored.now = scene.now + 1000
        restored.round(20)
        [run] = [run for run in restored.jobs.submissions.values() if run.metadata["attempt"] == "2"]
        restored.begins(run.run)
        restored.report(run.run, FINISH)
        restored.jobs.ends(restored.job(run.run))
        restored.round(2)
        assert restored.run(run.run).state == "succeeded"
        assert [event.position for event in whole_stream(database, restored.run(run.run))] == list(
            range(restored.run(run.run).next_position)
        )


def test_a_backup_during_writes_is_of_one_moment(database: Database, database_url: str, tmp_path: Path, state: Path):
    scene, file, ends = Scene.on(database, tmp_path), tmp_path / "backup.tar.gz", threading.Event()
    run_id = scene.running()

    def write() -> None:
        step = 0
        while not ends.is_set():
            step += 1
            scene.report(run_id, Event("progress", "submodels", "submodel-0", _step(step)))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(3):
            back_up(database_url, state, file)
    finally:
        ends.set()
        writer.join()
    url = f"sqlite:///{tmp_path / 'new' / 'service.sqlite3'}"
    restore(url, tmp_path / "new", file)
    with contextlib.closing(Database(url)) as restored:
        run = Scene.on(restored, tmp_path).run(run_id)
        assert [event.position for event in whole_stream(restored, run)] == list(range(run.next_position))
        with restored.read() as session:
            points = session.execute(text("SELECT count(*) FROM points")).scalar_one()
        assert points == run.next_seq - 1 > 0
    with database.read() as session:
        assert 0 <= leases.ages(session)[leases.BACKUP] < 60


def test_a_backup_of_an_earlier_version_is_migrated(tmp_path: Path):
    put_state("a624334", tmp_path)
    (tmp_path / "state" / "secret").write_bytes(b"of drivers")
    file, new = tmp_path / "backup.tar.gz", tmp_path / "new"
    old = f"sqlite:///{tmp_path / 'state' / 'service.sqlite3'}"
    made = back_up(old, tmp_path / "state", file)
    assert made.revision < "0009"
    restore(f"sqlite:///{new / 'service.sqlite3'}", new, file)
    with contextlib.closing(Database(f"sqlite:///{new / 'service.sqlite3'}")) as database:
        database.check()
        assert {state: Scene.on(database, tmp_path).run(run).state for state, run in RUNS.items()} == {
            state: state for state in RUNS
        }
        assert service_secrets(database, new).drivers == b"of drivers"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of a database with one run."""
    home = tmp_path_factory.mktemp("good")
    url = f"sqlite:///{home / 'service.sqlite3'}"
    with contextlib.closing(Database(url)) as database:
        database.migrate()
        insert_run(database)
    back_up(url, home, home / "backup.tar.gz")
    return home / "backup.tar.gz"


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def packed(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def changed(contents: dict[str, bytes], **manifest: Any) -> dict[str, bytes]:
    return contents | {"manifest.json": json.dumps(json.loads(contents["manifest.json"]) | manifest).encode()}


ROWS = "tables/runs/000000.jsonl"
DAMAGES: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "a later format": (
        lambda found: changed(found, format=2, version="9.9"),
        r"made by a later version \(9\.9\); restore it with that one",
    ),
    "a later revision": (
        lambda found: changed(found, revision="9999", version="9.9"),
        r"made by a later version \(9\.9, tables 9999\)",
    ),
    "a changed row": (lambda found: found | {ROWS: found[ROWS].replace(b"ann", b"bob")}, "not those of its manifest"),
    "a missing member": (lambda found: {k: v for k, v in found.items() if k != ROWS}, "not those of its manifest"),
    "a further member": (lambda found: {"state/../x": b"", **found}, "not those of its manifest"),
    "no manifest": (lambda found: {ROWS: found[ROWS]}, "its end is missing"),
    "a row that is none": (lambda found: found | {ROWS: b"{}\n"}, "a row is no list"),
    "no JSON": (lambda found: found | {ROWS: b"{\n"}, "a row is no JSON"),
    "a manifest that is none": (lambda found: found | {"manifest.json": b"[]"}, "its manifest cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_later_backup_changes_nothing(good: Path, tmp_path: Path, damage: str):
    change, says = DAMAGES[damage]
    with pytest.raises(ConfigError, match=rf"^FILE: '.*': .*{says}"):
        restore_new(packed(tmp_path / "backup.tar.gz", change(members(good))), tmp_path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999, None])
def test_a_truncated_file_or_another_one_is_refused(good: Path, tmp_path: Path, share: float | None):
    whole, file = good.read_bytes(), tmp_path / "backup.tar.gz"
    file.write_bytes(b"a text" if share is None else whole[: int(share * len(whole))])
    with pytest.raises(ConfigError, match=r"^FILE: '.*': is no backup of the service, or is damaged"):
        restore_new(file, tmp_path)
    with pytest.raises(ConfigError, match=r"^FILE: '.*': cannot be read"):
        restore_new(tmp_path / "missing", tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_backup_whose_tables_are_others_is_rolled_back(good: Path, tmp_path: Path):
    found = members(good)
    tables = json.loads(found["manifest.json"])["tables"]
    for table in tables:
        table["columns"] = [column | {"name": column["name"].replace("owner", "owns")} for column in table["columns"]]
    with pytest.raises(ConfigError, match=r"its table '\w+' is not that of revision"):
        restore_new(packed(tmp_path / "backup.tar.gz", changed(found, tables=tables)), tmp_path)
    with contextlib.closing(Database(new_url(tmp_path))) as database, database.read() as session:
        assert Database.revision(session) is None


def new_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'new' / 'service.sqlite3'}"


def restore_new(file: Path, tmp_path: Path) -> None:
    restore(new_url(tmp_path), tmp_path / "new", file)


def test_only_an_empty_database_that_no_service_uses_is_filled(good: Path, database: Database, tmp_path: Path, request):
    url = request.getfixturevalue("database_url")
    with database.write() as session:
        assert leases.take(session, leases.LEASE, "host-1", 60.0, starts=True)
    with pytest.raises(ConfigError, match=r"^--database-url: '.*': is in use by the service host-1; stop it"):
        restore(url, tmp_path / "new", good)
    with database.write() as session:
        session.get(leases.LeaseRow, leases.LEASE).ends = 0.0
    restore(url, tmp_path / "new", good)
    before = everything(url)
    with pytest.raises(ConfigError, match=r"^--database-url: '.*': has rows; restore into an empty database"):
        restore(url, tmp_path / "new", good)
    assert everything(url) == before
    with locked(tmp_path / "new"), pytest.raises(ConfigError, match=r"^--state-dir: .*another service uses it"):
        restore(url, tmp_path / "new", good)


@pytest.fixture(params=["write", "sync", "copy"])
def full_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The disk is full at one of the steps."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_copy(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    if request.param == "write":
        monkeypatch.setattr(gzip.GzipFile, "write", full)
    elif request.param == "sync":
        monkeypatch.setattr(backups.os, "fsync", full)
    else:
        monkeypatch.setattr(snapshots.sqlite3, "connect", no_copy)
    yield
    monkeypatch.undo()


def test_a_full_disk_leaves_the_earlier_backup(
    good: Path, tmp_path: Path, request: pytest.FixtureRequest, full_disk: None
):
    file = tmp_path / "backup.tar.gz"
    file.write_bytes(good.read_bytes())
    with pytest.raises(ConfigError, match=r"^FILE: '.*': cannot be written.*(No space left|disk is full)"):
        back_up(f"sqlite:///{good.parent / 'service.sqlite3'}", good.parent, file)
    assert file.read_bytes() == good.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["backup.tar.gz"]


def test_what_cannot_be_backed_up_is_one_clear_line(good: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"^--database-url: '.*': does not exist"):
        back_up(f"sqlite:///{tmp_path / 'none'}", tmp_path, tmp_path / "x")
    sqlite3.connect(tmp_path / "empty").close()
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match=r"^--database-url: '.*': has no tables; nothing was backed up"):
        back_up(f"sqlite:///{tmp_path / 'empty'}", tmp_path, tmp_path / "x")
    with pytest.raises(ConfigError, match=r"^FILE: '.*': cannot be written \(No such file or directory\)"):
        back_up(f"sqlite:///{good.parent / 'service.sqlite3'}", good.parent, tmp_path / "missing" / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_document_is_kept_as_it_is(good: Path, tmp_path: Path, request: pytest.FixtureRequest):
    """Text that is no JSON stays in SQLite; in PostgreSQL, which refuses it, it becomes a JSON text."""
    url = f"sqlite:///{tmp_path / 'service.sqlite3'}"
    restore(url, tmp_path, good)
    with contextlib.closing(sqlite3.connect(tmp_path / "service.sqlite3")) as raw, raw:
        raw.execute("UPDATE runs SET meter = '{\"a\": NaN'")
    back_up(url, tmp_path, tmp_path / "backup.tar.gz")
    for kind in ("sqlite", "postgresql"):
        new = target(kind, tmp_path, request)
        restore(new, tmp_path / "new", tmp_path / "backup.tar.gz")
        with contextlib.closing(Database(new)) as database:
            [run_id] = (row[0] for row in _ids(database))
            assert Scene.on(database, tmp_path).run(run_id).unreadable is not None


def _ids(database: Database) -> list[Any]:
    with database.read() as session:
        return list(session.execute(text("SELECT id FROM runs")).all())


def test_long_tables_are_split(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backup_archive, "_PART_BYTES", 1)
    url = f"sqlite:///{tmp_path / 'service.sqlite3'}"
    restore(url, tmp_path, good)
    with contextlib.closing(Database(url)) as database:
        for _ in range(3):
            insert_run(database, now=T0)
    made = back_up(url, tmp_path, tmp_path / "backup.tar.gz")
    assert sum(member.name.startswith("tables/runs/") for member in made.members) == made.count("runs") == 4
    restore_new(tmp_path / "backup.tar.gz", tmp_path)
    assert everything(new_url(tmp_path))["runs"] == everything(url)["runs"]


def test_the_commands_of_the_documentation_move_a_service_to_postgresql(
    tmp_path: Path, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
):
    """Every line with `backup` or `restore`, in their order; those of `restore` have a new place each."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    url = f"sqlite:///{tmp_path / 'home' / 'moedisco' / 'service.sqlite3'}"
    (tmp_path / "srv" / "backup").mkdir(parents=True)
    with contextlib.closing(Database(url)) as database:
        database.migrate()
        run = insert_run(database)
    page = (Path(__file__).resolve().parents[2] / "docs" / "operating.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\$ moedisco ((?:backup|restore) .*)$", page, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["backup", "restore", "backup", "backup", "restore"]
    for line in lines:
        words = line.replace("postgresql+psycopg://moedisco@db.example.org/moedisco", postgresql_url)
        result = CliRunner().invoke(app, words.replace("/srv/", f"{tmp_path}/srv/").split())
        assert result.exit_code == 0, result.output
        assert "1 run" in result.stdout
    for place in (postgresql_url, f"sqlite:///{tmp_path / 'srv' / 'moedisco' / 'service.sqlite3'}"):
        with contextlib.closing(Database(place)) as database:
            assert Scene.on(database, tmp_path).run(run.id).name == "demo"
