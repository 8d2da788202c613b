from __future__ import annotations

import contextlib
import socket
import sqlite3
import threading

import pytest
from databases import T0, insert_run, reload
from sqlalchemy import create_engine, exc, text
from sqlalchemy.engine import make_url

from moedisco_ray.core.errors import ConfigError
from service.database import policies, runs
from service.database import session as session_module
from service.database.ids import Ulids, new_id
from service.database.session import Database
from service.domain.policies import Policy
from service.domain.run_paths import is_id
from service.errors import DatabaseError, DatabaseUnavailable


def test_what_is_written_is_there_and_stays_readable_after_the_transaction(database):
    with database.write() as session:
        policies.put(session, "ann", Policy(queued_runs=3), T0)
        written = policies.load(session)
    with database.read() as session:
        read = policies.load(session)
    assert written == read
    assert read.owners["ann"].queued_runs == 3


def test_an_error_in_the_block_takes_everything_back(database):
    with pytest.raises(ZeroDivisionError), database.write() as session:
        policies.put(session, "ann", Policy(), T0)
        _ = 1 / 0
    with database.read() as session:
        assert policies.load(session).owners == {}


def test_a_reading_transaction_cannot_write(database):
    with pytest.raises((DatabaseError, exc.DBAPIError)), database.read() as session:
        policies.put(session, "ann", Policy(), T0)
    with database.read() as session:
        assert policies.load(session).owners == {}


def test_a_reader_sees_one_moment_while_another_writes(database):
    with database.read() as reader:
        assert policies.load(reader).owners == {}
        with database.write() as writer:
            policies.put(writer, "ann", Policy(), T0)
        assert policies.load(reader).owners == {}
    with database.read() as reader:
        assert len(policies.load(reader).owners) == 1


def test_changes_made_under_the_lock_of_a_run_are_never_lost(database):
    run = insert_run(database)

    def add() -> None:
        for _ in range(10):
            with database.write() as session:
                row = runs.lock(session, run.id)
                runs.amend(session, row, now=T0, priority=row.priority + 1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reload(database, run).priority == 40


@pytest.mark.parametrize("url", ["mysql://host/name", "sqlite://", "sqlite:///:memory:", "postgresql://host/name"])
def test_a_url_of_anything_else_is_refused(url):
    with pytest.raises(ConfigError, match="database_url"):
        Database(url)


def test_a_database_without_tables_is_not_current(empty_database):
    with pytest.raises(DatabaseError, match="migrate it") as caught:
        empty_database.check()
    assert not isinstance(caught.value, DatabaseUnavailable)


def test_sqlite_without_tables_differs_from_unavailable_sqlite(tmp_path):
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'new.sqlite3'}")) as database:
        with pytest.raises(DatabaseError, match="no such table") as caught, database.read() as session:
            policies.load(session)
        assert caught.value.status == 500


def test_a_lock_that_another_process_keeps_makes_sqlite_unavailable_for_as_long(tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "PATIENCE", 0.1)
    file = tmp_path / "busy.sqlite3"
    with contextlib.closing(Database(f"sqlite:///{file}")) as database:
        database.migrate()
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(DatabaseUnavailable, match="locked"), database.write() as session:
                policies.load(session)
            other.execute("ROLLBACK")
        with database.write() as session:
            policies.put(session, "ann", Policy(), T0)


def test_a_thread_that_writes_for_too_long_makes_the_others_give_up(tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "PATIENCE", 0.1)
    refused = threading.Event()
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'busy.sqlite3'}")) as database:
        database.migrate()

        def try_to_write() -> None:
            with contextlib.suppress(DatabaseUnavailable), database.write():
                return
            refused.set()

        with database.write():
            thread = threading.Thread(target=try_to_write)
            thread.start()
            thread.join()
        assert refused.is_set()


def test_sqlite_writes_ahead_and_holds_foreign_keys(tmp_path):
    with (
        contextlib.closing(Database(f"sqlite:///{tmp_path / 'a' / 'b.sqlite3'}")) as database,
        database.read() as session,
    ):
        ask = {
            pragma: session.scalar(text(f"PRAGMA {pragma}"))
            for pragma in ("journal_mode", "foreign_keys", "synchronous")
        }
    assert ask == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 1}


def test_a_postgresql_without_a_server_is_unavailable():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with (
            contextlib.closing(
                Database(f"postgresql+psycopg://nobody@127.0.0.1:{taken.getsockname()[1]}/none")
            ) as database,
            pytest.raises(DatabaseUnavailable),
        ):
            database.check()


def _cut_connections(url: str) -> None:
    server = create_engine(make_url(url).set(database="postgres"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"),
            {"name": make_url(url).database},
        )
    server.dispose()


def test_a_connection_lost_in_a_transaction_is_unavailable_and_the_next_call_works(postgresql_url):
    with contextlib.closing(Database(postgresql_url)) as database:
        database.migrate()
        with pytest.raises(DatabaseUnavailable), database.write() as session:
            policies.put(session, "ann", Policy(), T0)
            _cut_connections(postgresql_url)
            policies.put(session, "ann", Policy(), T0)
        with database.write() as session:
            assert policies.load(session).owners == {}
            policies.put(session, "ann", Policy(), T0)


def test_connections_lost_while_idle_are_not_noticed(postgresql_url):
    with contextlib.closing(Database(postgresql_url)) as database:
        database.migrate()
        _cut_connections(postgresql_url)
        database.check()


def test_transactions_that_wait_for_each_other_end_with_one_unavailable(postgresql_url):
    both_hold = threading.Barrier(2)
    failed: list[DatabaseUnavailable] = []
    with contextlib.closing(Database(postgresql_url)) as database:
        database.migrate()
        first, second = insert_run(database), insert_run(database)

        def take(one: str, other: str) -> None:
            try:
                with database.write() as session:
                    runs.lock(session, one)
                    both_hold.wait()
                    runs.lock(session, other)
            except DatabaseUnavailable as error:
                failed.append(error)

        threads = [threading.Thread(target=take, args=pair) for pair in ((first.id, second.id), (second.id, first.id))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(failed) == 1


def test_ids_only_grow_and_say_when_they_were_made(monkeypatch):
    ids = [new_id() for _ in range(5000)]
    assert ids == sorted(set(ids))
    assert all(is_id(one) for one in ids)
    made = Ulids()
    monkeypatch.setattr("time.time_ns", lambda: 1_469_918_176_385_000_000)
    assert made().startswith("01ARYZ6S41")  # the ULID specification's own example
    later = made()
    monkeypatch.setattr("time.time_ns", lambda: 1_469_918_000_000_000_000)
    assert made() > later


@pytest.mark.parametrize(
    "odd",
    ["", "01ARYZ6S41", "81ARYZ6S41TSV4RRFFQ69G5FAV", "01aryz6s41tsv4rrffq69g5fav", "01ARYZ6S41TSV4RRFFQ69G5FA\x00"],
)
def test_what_has_not_the_form_of_an_id_is_none(odd):
    assert not is_id(odd)
