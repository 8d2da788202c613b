"""One process at a time holds the lease of the background work, and writes nothing once another holds it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from reconciling import Scene

from moedisco_ray.core.errors import ConfigError
from service import serve
from service.background.leasing import MARGIN_SECONDS, RENEW_SECONDS, TERM_SECONDS, BackgroundLease, replica_name
from service.database import leases
from service.database.session import Database
from service.errors import DatabaseUnavailable, LeaseLost
from service.settings import Settings


class Clock:
    """Monotonic seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Also replaces the clock of the database."""
    clock = Clock()
    monkeypatch.setattr(leases, "clock", lambda session: clock.now)  # noqa: ARG005 - the signature
    return clock


def test_the_clock_of_the_database_gives_seconds_since_the_epoch(database: Database):
    with database.read() as session:
        assert 0 <= leases.clock(session) - time.time() + 5 < 10


def test_another_replica_takes_the_lease_when_its_term_is_over(database: Database, clock: Clock):
    first, second = (BackgroundLease(database, name, clock) for name in ("one", "two"))
    assert [first.acquire(), second.acquire(), first.held, second.held] == [True, False, True, False]
    clock.now += TERM_SECONDS - 1
    assert not second.acquire()
    clock.now += 1
    assert second.acquire()
    assert not first.acquire()
    second.release()
    assert first.acquire()


def test_a_renewed_lease_does_not_end_and_a_restart_takes_it_at_once(database: Database, clock: Clock):
    first, second = (BackgroundLease(database, name, clock) for name in ("one", "two"))
    first.acquire()
    for _ in range(4):
        clock.now += TERM_SECONDS / 2
        assert first.acquire()
        assert not second.acquire()
    again = BackgroundLease(database, "one", clock)
    assert again.acquire()
    clock.now += RENEW_SECONDS
    assert not first.acquire()


def test_a_process_that_was_suspended_writes_nothing_and_starts_no_run(
    database: Database, tmp_path: Path, clock: Clock
):
    """Its round was under way when the term ended: it loads the queue, and another replica admits meanwhile."""
    scene = Scene.on(database, tmp_path)
    first, second = (BackgroundLease(database, name, clock) for name in ("one", "two"))
    run_id = scene.submit()
    scene.database = first.renewing()
    reconciler = scene.reconciler()

    def suspended(_: float) -> None:
        clock.now += TERM_SECONDS
        assert second.acquire()
        reconciler.round(scene.now)

    with pytest.raises(LeaseLost):
        first.rounds(suspended)(0.0)
    scene.database = database
    assert (scene.run(run_id).state, scene.jobs.asked) == ("queued", [])
    first.while_held(lambda _: pytest.fail("housekeeping of a replica without the lease"))(0.0)
    scene.database = second.renewing()
    second.rounds(scene.reconciler().round)(scene.now)
    assert len(scene.jobs.submissions) == 1


def test_the_check_in_the_database_holds_where_a_clock_was_wrong(database: Database, clock: Clock):
    first, second = (BackgroundLease(database, name, clock) for name in ("one", "two"))
    first.acquire()
    with database.write() as session:
        assert leases.take(session, leases.LEASE, "two", TERM_SECONDS, starts=True) is None
        session.get(leases.LeaseRow, leases.LEASE).ends = 0.0
    assert second.acquire()
    first.check()
    with pytest.raises(LeaseLost), first.checking().write():
        pytest.fail("written")


def test_a_holder_that_cannot_renew_stops_before_its_term_ends(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    lease = BackgroundLease(database, "one", clock)
    lease.acquire()
    clock.now += RENEW_SECONDS

    def away(*_: object) -> bool:
        raise DatabaseUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(leases, "renew", away)
        with pytest.raises(DatabaseUnavailable), lease.renewing().read():
            pytest.fail("read")
        assert lease.held
        clock.now += TERM_SECONDS - MARGIN_SECONDS - RENEW_SECONDS
        with pytest.raises(LeaseLost), lease.checking().read():
            pytest.fail("read")
    assert lease.acquire()


def test_the_time_of_the_last_complete_round_is_stored(database: Database, clock: Clock):
    lease = BackgroundLease(database, "one", clock)
    for _ in range(2):
        lease.rounds(lambda _: None)(0.0)
        clock.now += RENEW_SECONDS
    with database.read() as session:
        assert leases.ages(session) == {leases.ROUND: RENEW_SECONDS}


def test_the_name_of_a_replica_stays(tmp_path: Path):
    assert replica_name(tmp_path / "a") == replica_name(tmp_path / "a") != replica_name(tmp_path / "b")


def test_a_service_with_a_ray_of_its_own_joins_no_other_one(
    database: Database, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It would not find the other's drivers, and start their runs again."""
    settings = Settings(state_dir=tmp_path, database_url=database_url)
    first, second = (BackgroundLease(database, name) for name in ("one", "two"))
    serve._refuse_another_ray(settings, database, first)
    monkeypatch.setattr(serve, "TERM_SECONDS", -1.0)
    says = r"^--database-url: '.*': another replica \(one\) works with this database; start both with the same"
    with pytest.raises(ConfigError, match=says):
        serve._refuse_another_ray(settings, database, second)
    first.release()
    serve._refuse_another_ray(settings, database, second)
