from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from databases import T0, config
from hypothesis import given, settings
from hypothesis import strategies as st

from service.database import audit, idempotency, runs, tokens, values
from service.database.ids import new_id
from service.domain.states import RunState

DAY = 24 * 3600.0


def make_token(database, **changes):
    asked = {"name": "laptop", "owner": "ann", "scopes": ["read"], "expires": None, "now": T0}
    with database.write() as session:
        return tokens.create(session, **(asked | changes))


def find_token(database, plain, now=T0):
    with database.read() as session:
        return tokens.find(session, plain, now)


def test_a_token_is_found_and_stored_only_as_its_hash(database):
    plain, row = make_token(database)
    assert plain.startswith("mdk_")
    assert len(plain) > 40
    assert find_token(database, plain).id == row.id
    assert plain.encode() not in row.hash
    for wrong in ("", plain[:-1], plain.upper(), "\x00", "\ud800", "x" * 10_000):
        assert find_token(database, wrong) is None


def test_a_token_ends_when_it_expires_or_is_revoked(database):
    plain, row = make_token(database, expires=T0 + 10)
    lasting, other = make_token(database)
    assert find_token(database, plain, T0 + 9.9) is not None
    assert find_token(database, plain, T0 + 10) is None
    with database.write() as session:
        assert tokens.count_valid(session, T0 + 11) == 1
        tokens.revoke(session, other, T0 + 5)
        tokens.revoke(session, other, T0 + 6)
        assert tokens.count_valid(session, T0) == 1
    assert find_token(database, lasting) is None
    with database.read() as session:
        found, _ = tokens.page(session, limit=50)
    assert [(token.id, token.revoked) for token in found] == [(row.id, None), (other.id, T0 + 5)]


def test_the_use_of_a_token_is_noted_once_a_minute(database):
    plain, row = make_token(database)
    assert not tokens.used_lately(row, T0)
    with database.write() as session:
        tokens.touch(session, row, T0)
    assert tokens.used_lately(find_token(database, plain), T0 + 59)
    assert not tokens.used_lately(find_token(database, plain), T0 + 60)


def test_a_key_is_remembered_for_a_day_per_owner(database):
    with database.write() as session:
        assert idempotency.find(session, "ann", "k\x00", T0) is None
        idempotency.remember(session, owner="ann", key="k\x00", body_hash=b"h" * 32, run_id=new_id(), now=T0)
    with database.write() as session:
        assert idempotency.find(session, "ann", "k\x00", T0 + DAY - 1).body_hash == b"h" * 32
        assert idempotency.find(session, "bob", "k\x00", T0) is None
        assert idempotency.find(session, "ann", "k\x00", T0 + DAY) is None
        idempotency.remember(session, owner="ann", key="k\x00", body_hash=b"i" * 32, run_id=new_id(), now=T0 + DAY)
        idempotency.purge(session, T0 + DAY + 5)
        assert idempotency.find(session, "ann", "k\x00", T0 + DAY + 5).body_hash == b"i" * 32
        idempotency.purge(session, T0 + 2 * DAY)
        assert idempotency.find(session, "ann", "k\x00", T0 + DAY + 5) is None


def test_requests_with_one_key_that_arrive_at_once_make_one_run(database):
    def submit(_):
        with database.write() as session:
            known = idempotency.find(session, "ann", "key", T0)
            if known is not None:
                return known.run_id
            run = runs.insert(
                session,
                run_id=new_id(),
                config=config(),
                owner="ann",
                priority=0,
                budget_dollars=None,
                estimate={},
                parent=None,
                now=T0,
            )
            idempotency.remember(session, owner="ann", key="key", body_hash=b"h" * 32, run_id=run.id, now=T0)
            return run.id

    with ThreadPoolExecutor(6) as threads:
        made = set(threads.map(submit, range(6)))
    with database.read() as session:
        assert {run.id for run in runs.in_states(session, [RunState.QUEUED])} == made
    assert len(made) == 1


def test_the_audit_log_is_read_backwards_page_by_page(database):
    for number in range(5):
        with database.write() as session:
            audit.note(
                session,
                owner="ann",
                token_id=None,
                action="run.submit",
                target=f"r{number}\x00",
                detail={"n": float("nan")},
                address="127.0.0.1",
                now=T0 + number,
            )
    with database.read() as session:
        first, cursor = audit.page(session, cursor=None, limit=3)
        second, end = audit.page(session, cursor=cursor, limit=3)
    assert [entry.target for entry in first + second] == [f"r{number}\ufffd" for number in (4, 3, 2, 1, 0)]
    assert (end, first[0].detail) == (None, {"n": None})


@settings(deadline=None)
@given(st.text() | st.just("\x00\ud800"))
def test_any_text_becomes_fit_to_be_stored(value):
    fit = values.text(value)
    assert "\x00" not in fit
    assert len(fit.encode()) >= len(fit) == len(value)
    assert values.text(fit, 5) == fit[:5]


def test_only_whole_numbers_that_a_column_holds_are_whole():
    assert [values.whole(value) for value in (3, 3.0, 0, -1, 2**63, True, "3", None, float("nan"), 0.5)] == [
        3,
        3,
        0,
        None,
        None,
        None,
        None,
        None,
        None,
        None,
    ]
    assert [values.number(value) for value in (1, 10**400, float("inf"), True, "1")] == [1.0, None, None, None, None]


def test_what_is_nested_too_deeply_is_cut_off():
    deep = []
    for _ in range(5000):
        deep = [deep]
    assert str(values.document(deep)).count("[") < 100
