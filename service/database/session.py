"""Connects to SQLite or PostgreSQL, and runs reading and writing transactions."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, exc, text
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session, sessionmaker

from moedisco_ray.core.errors import ConfigError
from service.database import documents
from service.errors import DatabaseError, DatabaseUnavailable

MIGRATIONS = Path(__file__).parent / "migrations"
PATIENCE = 15.0
"""Maximum wait for a lock or a free connection, in seconds."""
_PAUSE = 0.01
"""Pause between two attempts, in seconds, if SQLite does not wait for a lock itself."""
_MIGRATION_LOCK = 7_236_001
_AWAY = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)


@dataclasses.dataclass(frozen=True)
class Guard:
    """Checks of the transactions of work that must stop when another process may do it.

    Attributes:
        before: Called before every transaction; what it raises prevents the transaction.
        inside: Called at the start of every writing transaction; what it raises rolls the transaction back.
    """

    before: Callable[[], None]
    inside: Callable[[Session], None]


class Database:
    """The service's database; one object serves all threads.

    Rows stay readable after their transaction. After a failed transaction they must be loaded again, because they may
    contain changes that were rolled back.

    Args:
        url: `sqlite:///FILE` or `postgresql+psycopg://...`.

    Raises:
        ConfigError: The URL has neither form.
    """

    def __init__(self, url: str) -> None:
        self._engine = _sqlite(url) if url.startswith("sqlite:") else _postgresql(url)
        sqlite = self.dialect == "sqlite"
        reading: dict[str, Any] = (
            {"begin": "READ"} if sqlite else {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        )
        self._read = sessionmaker(self._engine.execution_options(**reading), expire_on_commit=False)
        self._write = sessionmaker(self._engine.execution_options(begin="WRITE"), expire_on_commit=False)
        # SQLite allows one writer at a time, and waiting for its lock is slow and not fair.
        self._turn = threading.Lock() if sqlite else None
        self.guard: Guard | None = None

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._engine.dialect.name

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """Run a transaction that is committed at the end of the block and rolled back if the block raises.

        Raises:
            DatabaseUnavailable: The connection or a lock was lost; it may be unknown whether the transaction was
                committed.
            DatabaseError: The tables are not those of this version.
        """
        if self.guard is not None:
            self.guard.before()
        with self._in_turn(), _translated(), self._write.begin() as session:
            if self.guard is not None:
                self.guard.inside(session)
            yield session

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """Run a read-only transaction on a snapshot of the database; raises the same errors as `write`."""
        if self.guard is not None:
            self.guard.before()
        with _translated(), self._read.begin() as session:
            yield session

    def guarded(self, guard: Guard) -> Database:
        """The same database, for work that must stop when another process may do it."""
        other = copy.copy(self)
        other.guard = guard
        return other

    def migrate(self, revision: str = "head") -> None:
        """Migrate the tables to a revision (`head`, `base` or an id).

        If several processes start at once, only one migrates.

        Raises:
            DatabaseUnavailable: The database does not answer.
        """
        with self.write() as session:
            self.migrate_in(session, revision)

    def migrate_in(self, session: Session, revision: str = "head") -> None:
        """Migrate the tables inside a writing transaction; see `migrate`."""
        if self.dialect == "postgresql":
            session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
        config = alembic_config(session.connection())
        current, target = self.revision(session), _script().as_revision_number(revision)
        if current == target:
            return
        back = current is not None and (revision == "base" or target in _ancestors(current))
        (command.downgrade if back else command.upgrade)(config, revision)

    def check(self) -> None:
        """Check that the database answers and has the tables of this version.

        Raises:
            DatabaseUnavailable: The database does not answer.
            DatabaseError: The tables are at another revision.
        """
        with self.read() as session:
            current = self.revision(session)
        head = _script().get_current_head()
        if current != head:
            raise DatabaseError(f"the database is at revision {current}, this version needs {head}: migrate it")

    def close(self) -> None:
        self._engine.dispose()

    @staticmethod
    def revision(session: Session) -> str | None:
        """Revision of the tables; None without tables."""
        return MigrationContext.configure(session.connection()).get_current_revision()

    @staticmethod
    def revisions() -> frozenset[str]:
        """Revisions that this version can migrate."""
        return frozenset(step.revision for step in _script().walk_revisions())

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        if self._turn is None:
            yield
            return
        if not self._turn.acquire(timeout=PATIENCE):
            raise DatabaseUnavailable("the database is busy: another transaction has been writing for too long")
        try:
            yield
        finally:
            self._turn.release()


def lock_until_commit(session: Session, *names: str) -> None:
    """Take the lock that the names identify, until this transaction ends.

    SQLite needs none, because it allows only one writer.
    """
    if session.get_bind().dialect.name == "postgresql":
        number = int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:8], "big", signed=True)
        session.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": number})


def alembic_config(connection: Connection) -> Config:
    """Alembic configuration that migrates inside an open transaction."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except _AWAY as error:
        orig = getattr(error, "orig", None)
        cause = " ".join(str(orig or error).split())
        if getattr(orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:  # the statement does not fit the tables
            raise DatabaseError(f"the database's tables are not those of this version ({cause}): migrate it") from error
        raise DatabaseUnavailable(f"the database does not answer: {cause}") from error
    except exc.DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise DatabaseUnavailable("the connection to the database was lost") from error


@functools.cache
def _script() -> ScriptDirectory:
    return ScriptDirectory(str(MIGRATIONS))


def _ancestors(revision: str) -> set[str]:
    return {step.revision for step in _script().iterate_revisions(revision, "base")}


def _serialize(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _sqlite(url: str) -> Engine:
    path = make_url(url).database
    if not path or path == ":memory:":
        raise ConfigError(
            "database_url", url, "must name a file, because a database in memory is lost with its connection"
        )
    Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    Path(path).touch(0o600)  # private; SQLite creates its WAL files with the same mode
    engine = create_engine(
        url,
        connect_args={"timeout": PATIENCE, "isolation_level": None},
        json_serializer=_serialize,
        json_deserializer=documents.as_stored,
        hide_parameters=True,
        pool_size=10,
        max_overflow=40,
        pool_timeout=PATIENCE,
    )

    @event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:  # noqa: ARG001 - SQLAlchemy's signature
        _log_ahead(connection)
        for pragma in ("synchronous=NORMAL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writing transaction locks at BEGIN: two that read first and lock later would deadlock.
        writes = connection.get_execution_options().get("begin") == "WRITE"
        connection.exec_driver_sql(f"PRAGMA query_only={'OFF' if writes else 'ON'}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _log_ahead(connection: sqlite3.Connection) -> None:
    """Turn on write-ahead logging; the database file keeps this setting."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            # While another connection turns WAL on, SQLite fails at once and ignores its lock timeout.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
            time.sleep(_PAUSE)
        else:
            return


def _postgresql(url: str) -> Engine:
    if not url.startswith("postgresql+psycopg:"):
        raise ConfigError("database_url", url, "must start with sqlite:/// or postgresql+psycopg://")
    milliseconds = int(1000 * PATIENCE)
    # jit=off: compilation takes longer than any statement of the service.
    options = f"-c lock_timeout={milliseconds} -c idle_in_transaction_session_timeout={4 * milliseconds} -c jit=off"
    return create_engine(
        url,
        connect_args={"connect_timeout": 5, "options": options},
        json_serializer=_serialize,
        json_deserializer=documents.as_stored,
        hide_parameters=True,
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=20,
        pool_timeout=PATIENCE,
    )
