"""Databases for tests: SQLite, and PostgreSQL where MOEDISCO_TEST_POSTGRES names a server for new databases."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from moedisco_ray.core.config import RunConfig
from service.database import runs, stream
from service.database.ids import new_id
from service.database.session import Database
from service.database.table import Table
from service.database.tables import EventRow, RunRow

SERVER = os.environ.get("MOEDISCO_TEST_POSTGRES")
T0 = 1_800_000_000.0


@contextlib.contextmanager
def postgresql_database() -> Iterator[str]:
    """URL of a new database, which is dropped afterwards; skips where there is no server."""
    if SERVER is None:
        pytest.skip("no PostgreSQL; on Debian: apt-get install postgresql")
    name = f"moedisco_test_{new_id().lower()}"
    server = create_engine(make_url(SERVER).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    try:
        with server.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        yield server.url.set(database=name).render_as_string(hide_password=False)
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        server.dispose()


@pytest.fixture
def postgresql_url() -> Iterator[str]:
    with postgresql_database() as url:
        yield url


@pytest.fixture(scope="session")
def migrated_postgresql() -> Iterator[str]:
    """URL of a migrated database that tests use one after the other: a migration takes longer than most of them."""
    with postgresql_database() as url:
        with contextlib.closing(Database(url)) as database:
            database.migrate()
        yield url


def _empty(url: str) -> None:
    """Delete all rows, and end all other connections, as dropping the database would."""
    engine = create_engine(url)
    with engine.begin() as connection:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
        for table in reversed(Table.metadata.sorted_tables):
            connection.execute(table.delete())
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.sqlite3'}"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def empty_database(empty_url: str) -> Iterator[Database]:
    """Without tables."""
    with contextlib.closing(Database(empty_url)) as database:
        yield database


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a database without rows, for `migrate`."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'service.sqlite3'}"
    else:
        yield (url := request.getfixturevalue("migrated_postgresql"))
        _empty(url)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """With the tables of this version."""
    with contextlib.closing(Database(database_url)) as database:
        migrate(database, database_url)
        yield database


def migrate(database: Database, url: str) -> None:
    """Give a database the tables of this version; a new one of SQLite gets a copy of them, which is faster."""
    file = make_url(url).database
    if database.dialect == "sqlite" and file is not None and not Path(file).stat().st_size:
        Path(file).write_bytes(_tables())
    database.migrate()


@functools.cache
def _tables() -> bytes:
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "service.sqlite3"
        with contextlib.closing(Database(f"sqlite:///{path}")) as database:
            database.migrate()
        return path.read_bytes()


def config(**changes: object) -> RunConfig:
    return RunConfig.model_validate({"name": "demo", "corpus": {"sources": [{"path": "embedded"}]}} | changes)


def insert_run(
    database: Database,
    *,
    owner: str = "ann",
    priority: int = 0,
    now: float = T0,
    budget: float | None = None,
    **changes: object,
) -> RunRow:
    """A queued run; its configuration is the demo's with `changes`."""
    with database.write() as session:
        return runs.insert(
            session,
            run_id=new_id(),
            config=config(**changes),
            owner=owner,
            priority=priority,
            budget_dollars=budget,
            estimate={},
            parent=None,
            now=now,
        )


def reload(database: Database, run: RunRow) -> RunRow:
    with database.read() as session:
        found = runs.get(session, run.id)
    assert found is not None
    return found


def whole_stream(database: Database, run: RunRow) -> list[EventRow]:
    with database.read() as session:
        return stream.read(session, run.id, -1, 1_000_000)
