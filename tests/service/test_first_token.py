"""The first administrator's token: made once, kept in a file for its owner alone, never in a log."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from moedisco_ray.core.errors import ConfigError
from service.bootstrap import create_token, first_token
from service.client import Client, ServiceProblem
from service.database import tokens
from service.database.access_tables import Token
from service.database.session import Database
from service.schemas.access import Identity

SECRET = "0123456789abcdef" * 4


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'service.sqlite3'}")) as database:
        database.migrate()
        yield database


def entered(database: Database) -> list[Token]:
    with database.read() as session:
        return tokens.page(session, limit=50)[0]


def valid(database: Database, plain: str) -> list[str] | None:
    with database.read() as session:
        token = tokens.find(session, plain, time.time())
    return None if token is None else token.scopes


def revoke_all(database: Database) -> None:
    with database.write() as session:
        for token in tokens.page(session, limit=50)[0]:
            tokens.revoke(session, token, time.time())


def test_it_is_made_once_in_a_file_for_its_owner_alone(database: Database, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = first_token(database, tmp_path / "made" / "token")
    finally:
        os.umask(before)
    assert made is not None
    assert (tmp_path / "made" / "token").read_text() == f"{made}\n"
    assert stat.S_IMODE((tmp_path / "made" / "token").stat().st_mode) == 0o600
    assert valid(database, made) == ["read", "submit", "admin"]
    assert first_token(database, tmp_path / "made" / "token") == made
    assert len(entered(database)) == 1


def test_a_file_that_exists_is_the_token_at_every_start(database: Database, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(SECRET + "\n")
    for _ in range(3):
        assert first_token(database, tmp_path / "token") == SECRET
    assert valid(database, SECRET) == ["read", "submit", "admin"]
    assert len(entered(database)) == 1


def test_a_start_that_was_cut_off_is_completed_with_the_same_token(database: Database, tmp_path: Path) -> None:
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'lost.sqlite3'}")) as lost:
        lost.migrate()
        made = first_token(lost, tmp_path / "token")
    assert first_token(database, tmp_path / "token") == made


def test_a_replaced_file_brings_a_further_token_and_revokes_none(database: Database, tmp_path: Path) -> None:
    made = first_token(database, tmp_path / "token")
    assert made is not None
    (tmp_path / "token").write_text(SECRET)
    assert first_token(database, tmp_path / "token") == SECRET
    assert valid(database, SECRET)
    assert valid(database, made)


def test_a_revoked_token_is_not_revived(database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = first_token(database, tmp_path / "token")
    assert made is not None
    revoke_all(database)
    assert first_token(database, tmp_path / "token") is None
    assert valid(database, made) is None
    assert "is revoked or expired and is not used" in caplog.text
    assert made not in caplog.text


def test_none_is_made_where_there_are_tokens(database: Database, tmp_path: Path) -> None:
    create_token(f"sqlite:///{tmp_path / 'service.sqlite3'}", "mine", "me", "admin", None)
    assert first_token(database, tmp_path / "token") is None
    assert not (tmp_path / "token").exists()


@pytest.mark.parametrize(
    "text", ["", "\n", "MY_ADMIN_TOKEN", "two words of more than thirty-two characters", "x" * 257, "\0" * 40, "é" * 40]
)
def test_what_is_no_token_is_refused(database: Database, tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(
        ConfigError, match=r"^--admin-token-file: '.*token': contains no token: write 32 to 256 visible characters"
    ):
        first_token(database, tmp_path / "token")
    assert not entered(database)


def test_a_place_that_cannot_be_written_is_one_clear_line(database: Database, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--admin-token-file: '.*': cannot be read or written \(.*\)"):
        first_token(database, tmp_path / "file" / "token")


@pytest.mark.parametrize(
    ("name", "owner", "days", "says"),
    [
        ("ci", "not an owner", 1, r"^--owner: 'not an owner': must match the pattern"),
        ("ci", "ann", 0, r"^--days: 0: must be greater than 0"),
        ("", "ann", 1, r"^NAME: ''"),
    ],
)
def test_what_names_no_token_is_said_by_the_options_name(
    tmp_path: Path, name: str, owner: str, days: float, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        create_token(f"sqlite:///{tmp_path / 'service.sqlite3'}", name, owner, "read", days)
    assert not (tmp_path / "service.sqlite3").exists()


# --- as processes


def surroundings(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MOEDISCO_", "XDG_"))}
    return kept | {"HOME": str(home)}


def whoami(url: str, plain: str) -> Identity:
    with Client(url, plain) as client:
        return client.identity()


def moedisco(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service", *words],
        env=surroundings(home),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@contextlib.contextmanager
def serving(home: Path, *words: str, output: int | None = None) -> Iterator[str]:
    """`moedisco serve` on a free port, without a Ray; yields its URL."""
    options = ["--port=0", "--ray-address=http://127.0.0.1:9", f"--state-dir={home / 'state'}", *words]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve", *options],
            env=surroundings(home),
            cwd=home,
            stdout=output or log,
            stderr=log,
            umask=0,
        )
    try:
        pid_file = home / "state" / "service.pid"
        while process.poll() is None and not (pid_file.exists() and len(pid_file.read_text().splitlines()) == 2):
            time.sleep(0.05)
        assert process.poll() is None, (home / "log").read_text()
        yield pid_file.read_text().splitlines()[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.mark.slow
def test_a_service_keeps_its_token_out_of_its_log_and_its_state_for_its_owner(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    (tmp_path / "state" / "service.sqlite3").touch(0o644)  # an earlier version's
    with serving(tmp_path, "--host=0.0.0.0", "--log-format=json") as url:
        plain = (tmp_path / "state" / "admin-token").read_text().strip()
        assert whoami(url, plain).owner == "admin"
        state = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
        assert {path.name for path in state} >= {"service.sqlite3-wal", "service.pid", "replica"}
        assert stat.S_IMODE(state[0].stat().st_mode) == 0o700
        open_to_others = {path.name for path in state[1:] if stat.S_IMODE(path.stat().st_mode) & 0o077}
        assert open_to_others <= {"service.sqlite3", "service.sqlite3-wal", "service.sqlite3-shm"}
    said = (tmp_path / "log").read_text()
    assert f"To sign in: {url}, with the token in {tmp_path / 'state' / 'admin-token'}\n" in said
    assert plain not in said
    assert plain not in (tmp_path / "state" / "service.pid").read_text()


def test_every_file_of_a_new_state_directory_is_for_its_owner_alone(tmp_path: Path) -> None:
    with serving(tmp_path):
        state = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
        assert {path.name for path in state} >= {
            "service.sqlite3",
            "service.sqlite3-wal",
            "service.sqlite3-shm",
            "service.pid",
        }
        assert not [path for path in state if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_a_terminal_is_shown_the_link_that_signs_in(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with serving(tmp_path, output=theirs) as url:
        os.close(theirs)
        plain = (tmp_path / "state" / "admin-token").read_text().strip()
        shown = b""
        while b"To sign in" not in shown or not shown.endswith(b"\n"):
            shown += os.read(ours, 65536)
        [code] = re.findall(f"To sign in: {re.escape(url)}/#code=(\\S+)", shown.decode())
        assert plain not in shown.decode()
        asked = [httpx.post(f"{url}/v1/session", json={"code": code}).status_code for _ in range(2)]
        another = moedisco(tmp_path, "sign-in").stdout
        assert re.fullmatch(f"{re.escape(url)}/#code=mdc_\\S{{43}}\n", another)
    os.close(ours)
    assert asked == [204, 401]


@pytest.mark.slow
def test_a_token_is_made_without_a_running_service_and_opens_the_service_that_is_started(tmp_path: Path) -> None:
    made = moedisco(
        tmp_path,
        "tokens",
        "create",
        "mine",
        "--owner",
        "me",
        "--scope",
        "admin",
        "--state-dir",
        str(tmp_path / "state"),
    )
    assert made.returncode == 0, made.stderr
    assert made.stderr == f"moedisco: created in sqlite:///{tmp_path / 'state' / 'service.sqlite3'}\n"
    plain = made.stdout.strip()
    assert re.fullmatch(r"mdk_\S{43}", plain)
    with serving(tmp_path, "--host=0.0.0.0") as url:
        assert whoami(url, plain).owner == "me"
        assert not (tmp_path / "state" / "admin-token").exists()
        another = moedisco(
            tmp_path,
            "tokens",
            "create",
            "ci",
            "--owner",
            "ann",
            "--json",
            "--database-url",
            f"sqlite:///{tmp_path / 'state' / 'service.sqlite3'}",
        )  # while the service runs
        assert whoami(url, json.loads(another.stdout)["token"]).scopes == ["read", "submit"]
        with pytest.raises(ServiceProblem):
            whoami(url, SECRET)
