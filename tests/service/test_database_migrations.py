from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from databases import insert_run, reload
from sqlalchemy import inspect, select, text

from service.database import policies, projects, quotas
from service.database.session import MIGRATIONS, Database
from service.database.table import Table
from service.database.tables import RunRow
from service.domain.access import Person


def test_the_migrations_make_exactly_the_tables_of_the_code(database):
    with database.write() as session:
        context = MigrationContext.configure(
            session.connection(), opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, Table.metadata) == []


def test_they_can_be_taken_back_and_made_again(empty_database):
    database = empty_database
    database.migrate()
    database.migrate("base")
    with database.read() as session:
        assert set(inspect(session.connection()).get_table_names()) <= {"alembic_version"}
    database.migrate()
    database.check()


def test_migrating_again_keeps_what_is_there(database):
    run = insert_run(database)
    database.migrate()
    assert reload(database, run).name == "demo"


def test_an_upgrade_keeps_the_price_book_and_what_was_spent_this_month(empty_database):
    now = time.time()
    empty_database.migrate("0001")
    with empty_database.write() as session:
        for resource, since, dollars in (("gpu", 1, 9.0), ("gpu", 2, 3.5), ("gpu", 0, 7.0), ("cpu", 1, 0.1)):
            session.execute(text("INSERT INTO prices VALUES (:r, :s, :d)"), {"r": resource, "s": since, "d": dollars})
        for number, (owner, dollars, created) in enumerate(
            [("ann", 1.5, now), ("ann", 2.0, now), ("bob", 4.0, now), ("bob", 8.0, now - 40 * 86_400)]
        ):
            session.execute(
                text(
                    "INSERT INTO runs (id, name, owner, tags, priority, state, version, config, directory, attempt, "
                    "futile, mark, mark_at_start, dollars, worker_seconds, meter, estimate, progress, next_position, "
                    "next_seq, created, queued, updated) VALUES "
                    "(:i, 'x', :o, '{}', 0, 'failed', 1, '{}', '/x', 0, 0, 0, 0, :d, '{}', '{}', '{}', '{}', 0, 0, "
                    ":c, :c, :c)"
                ),
                {"i": str(number), "o": owner, "d": dollars, "c": created},
            )
    empty_database.migrate()
    with empty_database.read() as session:
        assert policies.of(session, "ann").prices == {"gpu": 3.5, "cpu": 0.1}
        assert quotas.month_dollars(session, now) == {"ann": 3.5, "bob": 4.0}
        for owner, others in (("ann", {"0", "1"}), ("bob", {"2", "3"})):
            [(project, role)], _ = projects.page(session, Person(owner), limit=50)
            found = select(RunRow.id).where(RunRow.project == project.id)
            assert (project.name, role, set(session.scalars(found))) == (owner, "owner", others)


def test_processes_that_start_at_once_migrate_once(empty_url):
    def start(_: int) -> None:
        with contextlib.closing(Database(empty_url)) as database:
            database.migrate()
            database.check()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(start, range(4)))


def test_processes_that_open_a_new_file_at_once_all_get_in(tmp_path):
    """SQLite lets one turn on its write-ahead log and refuses the others at once; a tenth of the attempts met that."""

    def begin(database: Database) -> None:
        together.wait()
        with database.read() as session:
            session.connection()

    together = threading.Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        for number in range(30):
            databases = [Database(f"sqlite:///{tmp_path}/{number}.sqlite3") for _ in range(4)]
            try:
                list(threads.map(begin, databases))
            finally:
                for database in databases:
                    database.close()


def test_the_migrations_travel_with_the_package():
    assert {"env.py", "versions"} <= {entry.name for entry in MIGRATIONS.iterdir()}
    assert (MIGRATIONS / "versions" / "__init__.py").exists()
