from __future__ import annotations

import pytest
from databases import T0, config, insert_run, reload, whole_stream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moedisco_ray.core.records.events import Event
from service.database import ingest, metrics, runs, stream
from service.database.ids import new_id
from service.domain.states import ACTIVE, FOLLOWS, RunState
from service.errors import IllegalTransition, NotFound, StaleRun

FIXTURE_OK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)


def go(database, run, *states, **columns):
    for state in states:
        with database.write() as session:
            run = runs.lock(session, run.id)
            runs.transition(session, run, state, reason=None, now=T0 + 10, **columns)
    return run


WAY_TO = {
    RunState.QUEUED: (),
    RunState.STARTING: (RunState.STARTING,),
    RunState.RUNNING: (RunState.STARTING, RunState.RUNNING),
    RunState.STOPPING: (RunState.STARTING, RunState.STOPPING),
    RunState.SUCCEEDED: (RunState.STARTING, RunState.SUCCEEDED),
    RunState.FAILED: (RunState.STARTING, RunState.FAILED),
    RunState.CANCELLED: (RunState.CANCELLED,),
}


def test_a_new_run_waits_in_the_queue_and_its_stream_says_so(database):
    run = insert_run(database, priority=3, budget=2.5, tags={"team": "ü"})
    assert (run.state, run.priority, run.budget_dollars, run.tags, run.attempt) == ("queued", 3, 2.5, {"team": "ü"}, 0)
    assert run.directory.endswith("runs/demo")
    assert set(run.progress["stages"]) >= {"corpus", "seed", "export"}
    [event] = whole_stream(database, run)
    assert (event.position, event.type, event.data) == (0, "state", {"state": "queued", "reason": None, "attempt": 0})


@pytest.mark.parametrize("before", RunState)
def test_a_state_follows_another_only_where_the_table_says_so(database, before):
    for after in RunState:
        run = go(database, insert_run(database), *WAY_TO[before])
        if after in FOLLOWS[before]:
            assert go(database, run, after).state == after
        else:
            with pytest.raises(IllegalTransition, match=f"is {before}"):
                go(database, run, after)
            assert reload(database, run).state == before


@FIXTURE_OK
@given(choices=st.lists(st.integers(0, 6), max_size=12))
def test_every_change_of_state_is_one_more_version_and_one_more_event(database, choices):
    run = insert_run(database)
    states = ["queued"]
    for choice in choices:
        following = sorted(FOLLOWS[RunState(run.state)])
        if following:
            run = go(database, run, following[choice % len(following)])
            states.append(run.state)
    assert run.version == len(states)
    events = whole_stream(database, run)
    assert [event.position for event in events] == list(range(len(states)))
    assert [event.data["state"] for event in events] == states


def test_a_decision_on_an_older_reading_is_refused_and_leaves_no_trace(database):
    run = insert_run(database)
    seen = reload(database, run)
    go(database, run, RunState.STARTING)
    with pytest.raises(StaleRun), database.write() as session:
        runs.transition(session, seen, RunState.CANCELLED, reason=None, now=T0)
    with pytest.raises(StaleRun), database.write() as session:
        runs.amend(session, reload(database, run), now=T0, priority=1)
        runs.amend(session, seen, now=T0, priority=2)
    assert (reload(database, run).priority, len(whole_stream(database, run))) == (0, 2)


def test_a_run_can_be_changed_in_another_transaction_than_the_one_that_read_it(database):
    seen = reload(database, insert_run(database))
    with database.write() as session:
        runs.transition(session, seen, RunState.STARTING, reason="first", now=T0 + 1, attempt=1)
        runs.amend(session, seen, now=T0 + 2, reason="second")
    now = reload(database, seen)
    assert (now.state, now.reason, now.attempt, now.version, now.updated) == ("starting", "second", 1, 3, T0 + 2)
    assert (seen.state, seen.reason, seen.version) == ("starting", "second", 3)


def test_the_first_driver_sets_when_it_started_and_the_end_when_it_ended(database):
    run = go(database, insert_run(database), RunState.STARTING)
    assert run.started is None
    run = go(database, run, RunState.RUNNING)
    assert (run.started, run.ended) == (T0 + 10, None)
    assert go(database, run, RunState.FAILED).ended == T0 + 10


def test_a_lost_driver_leaves_the_run_its_place_and_a_resumed_run_goes_to_the_end(database):
    lost = go(database, insert_run(database), RunState.STARTING, RunState.QUEUED)
    later = insert_run(database, now=T0 + 5)
    resumed = go(database, insert_run(database, now=T0 - 5), RunState.STARTING, RunState.STOPPING, stop="cancelled")
    resumed = go(database, resumed, RunState.CANCELLED)
    resumed = go(database, resumed, RunState.QUEUED)
    assert (resumed.stop, resumed.ended, resumed.queued) == (None, None, T0 + 10)
    with database.read() as session:
        assert runs.queue_order(session) == [lost.id, later.id, resumed.id]


def test_the_queue_goes_by_priority_then_by_age(database):
    low, high, old = (insert_run(database, priority=p, now=T0 + at) for p, at in ((-1, 0), (5, 9), (0, 1)))
    new = insert_run(database, now=T0 + 2)
    with database.read() as session:
        assert runs.queue_order(session) == [high.id, old.id, new.id, low.id]


@pytest.mark.parametrize("odd", ["\x00", "'; DROP TABLE runs; --", "\ud800", "", "Z" * 500])
def test_odd_questions_find_nothing_and_break_nothing(database, odd):
    insert_run(database)
    with database.read() as session:
        assert runs.get(session, odd) is None
        assert stream.read(session, odd.replace("\x00", "").replace("\ud800", ""), 10**30, 10) == []


def test_a_deleted_run_leaves_nothing_and_others_stay(database):
    run, other = insert_run(database), insert_run(database)
    for each in (run, other):
        with database.write() as session:
            ingest.take(
                session,
                runs.lock(session, each.id),
                0,
                [Event("progress", "seed", "seed", {"step": 1, "tokens": 5, "loss": 2.0}, T0)],
                T0,
            )
    with database.write() as session:
        runs.delete(session, runs.lock(session, run.id))
    with database.read() as session:
        assert runs.get(session, run.id) is None
        assert (stream.read(session, run.id, -1, 10), runs.units(session, run.id)) == ([], [])
        assert metrics.series(session, run.id, "loss", None, 10) == []
        assert len(stream.read(session, other.id, -1, 10)) == 2
    with pytest.raises(NotFound), database.write() as session:
        stream.append(session, run, [Event("heartbeat")], T0)
    with pytest.raises(StaleRun), database.write() as session:
        runs.delete(session, run)


def test_runs_are_counted_by_state_and_the_active_ones_by_owner(database):
    insert_run(database)
    go(database, insert_run(database), RunState.STARTING)
    go(database, insert_run(database, owner="bob"), RunState.STARTING, RunState.RUNNING)
    go(database, insert_run(database, owner="bob"), RunState.STARTING, RunState.STOPPING)
    with database.read() as session:
        assert runs.owner_counts(session, ACTIVE) == {"ann": 1, "bob": 2}
        counts = runs.state_counts(session)
        assert {run.owner for run in runs.in_states(session, [RunState.RUNNING, RunState.STOPPING])} == {"bob"}
    assert (set(counts), counts[RunState.QUEUED], counts[RunState.FAILED]) == (set(RunState), 1, 0)


def test_texts_that_no_database_takes_are_mended(database):
    with database.write() as session:
        run = runs.insert(
            session,
            run_id=new_id(),
            config=config().model_copy(update={"tags": {"a\x00": "\ud800b"}}),
            owner="ann",
            priority=0,
            budget_dollars=None,
            estimate={"x": float("nan"), "y": "\x00"},
            parent=None,
            now=T0,
        )
        runs.transition(session, run, RunState.CANCELLED, reason="bad \x00 \udfff", now=T0)
    found = reload(database, run)
    assert (found.tags, found.reason) == ({"a\ufffd": "\ufffdb"}, "bad \ufffd \ufffd")
    assert found.estimate == {"x": None, "y": "\ufffd"}
