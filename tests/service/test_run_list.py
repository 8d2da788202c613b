"""Lists of runs: filters, orders, cursors, and what a run's events put into them."""

from __future__ import annotations

import contextlib
import json
import math
import random
import time

import pytest
from databases import T0, insert_run, reload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text, update

from moedisco_ray.core.records.events import Event
from service.database import ingest, run_list, runs
from service.database.tables import RunRow
from service.domain.run_list import (
    FIELDS,
    FIGURES,
    NULLABLE,
    TEXTS,
    WHOLE,
    Condition,
    Order,
    Position,
    Selection,
    parse_condition,
    parse_cursor,
    parse_order,
    to_cursor,
)
from service.domain.states import RunState
from service.errors import InvalidRequest

FIXTURE_OK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
ORDERS = [Order(field, descending) for field in FIELDS for descending in (False, True)]
RUN_ID = "01JDB5W3XQ3N8QZ7V0G6M4T9KE"
EVALUATED = Event("stage_finished", "evaluate", data={"summary": {"perplexity": 20.5, "bits_per_byte": 1.25}})
EXPORTED = Event("stage_finished", "export", data={"summary": {"active_parameters": 36_032}})


def filled(database, count):
    """Runs with few values, so that many are equal, and none in places."""
    chance = random.Random(7)
    made = [insert_run(database, owner="ab"[i % 2], now=T0 + i // 3, tags={"third": str(i % 3)}) for i in range(count)]
    with database.write() as session:
        for run in made:
            figures = {field: chance.choice([None, 0.5, 1.5, 1e9]) for field in NULLABLE - WHOLE}
            figures |= {field: chance.choice([None, 0, 2, 2**62]) for field in WHOLE}
            figures |= {"dollars": chance.choice([0.0, 0.1]), "name": chance.choice(["B", "a", "Ä", "a-b", "a_b"])}
            session.execute(update(RunRow).where(RunRow.id == run.id).values(**figures))
        return {run.id: run for run in session.scalars(select(RunRow).execution_options(populate_existing=True))}


def pages(database, selection=Selection(), order=Order(), limit=50):  # noqa: B008 - frozen
    found, cursor = [], None
    while True:
        with database.read() as session:
            page, cursor = run_list.page(session, selection, order=order, cursor=cursor, limit=limit)
        assert len(page) <= limit
        found += [run.id for run in page]
        if cursor is None:
            return found


def in_order(made, order):
    """The ids, sorted by Python."""
    value = {run_id: getattr(run, order.field) for run_id, run in made.items()}
    known = sorted((run_id for run_id in made if value[run_id] is not None), key=lambda each: (value[each], each))
    unknown = sorted(run_id for run_id in made if value[run_id] is None)
    return [*known[::-1], *unknown[::-1]] if order.descending else [*known, *unknown]


def test_the_pages_of_a_list_are_the_whole_list_in_every_order(database):
    made = filled(database, 40)
    for order in ORDERS:
        for limit in (7, 40):
            assert pages(database, order=order, limit=limit) == in_order(made, order), (order, limit)


def test_lists_are_narrowed_by_each_filter(database):
    made = filled(database, 24)
    with database.write() as session:
        [cancelled, first] = [runs.lock(session, run_id) for run_id in (max(made), min(made))]
        runs.transition(session, cancelled, RunState.CANCELLED, reason=None, now=T0)
        runs.amend(session, first, now=T0, name="Apple_1")
    cases = [
        ({"owner": "a"}, lambda run: run.owner == "a"),
        ({"tags": {"third": "1"}}, lambda run: run.tags["third"] == "1"),
        ({"tags": {"third": "1", "x": ""}}, lambda _: False),
        ({"states": (RunState.CANCELLED, RunState.FAILED)}, lambda run: run.id == cancelled.id),
        ({"name": "aPP"}, lambda run: run.id == first.id),
        ({"name": "e_1"}, lambda run: run.id == first.id),
        ({"name": "%"}, lambda _: False),
        ({"created_after": T0 + 3}, lambda run: run.created >= T0 + 3),
        ({"created_before": T0 + 3, "owner": "b"}, lambda run: run.created < T0 + 3 and run.owner == "b"),
        *(
            ({"where": (parse_condition(f"{field}{sign}{value}"),)}, condition(field, sign, value))
            for field in FIGURES
            for sign, value in (("<", 1.5), ("<=", 1.5), (">", 0.1), (">=", 2), ("=", 2), ("=", 0.1))
        ),
    ]
    with database.read() as session:
        everything = list(session.scalars(select(RunRow).order_by(RunRow.created.desc(), RunRow.id.desc())))
        for asked, expected in cases:
            found = [run.id for run in run_list.page(session, Selection(**asked), limit=50)[0]]
            assert found == [run.id for run in everything if expected(run)], asked
            assert run_list.ids(session, Selection(**asked), 3) == found[:3]


def condition(field, sign, value):
    def meets(run):
        found = getattr(run, field)
        comparison = {"<": "__lt__", "<=": "__le__", ">": "__gt__", ">=": "__ge__", "=": "__eq__"}[sign]
        return found is not None and getattr(float(found), comparison)(float(value))

    return meets


@FIXTURE_OK
@given(
    key=st.from_regex("[A-Za-z0-9_./-]{1,20}", fullmatch=True).filter(lambda key: key[0] not in "./-"),
    value=st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20),
)
def test_a_run_is_found_by_any_tag_it_has(database, key, value):
    run = insert_run(database, tags={key: value})
    with database.read() as session:
        newest, _ = run_list.page(session, Selection(tags={key: value}), order=parse_order("-created"), limit=1)
        none, _ = run_list.page(session, Selection(tags={key + "'\"": value}), limit=1)
    assert run.id in [found.id for found in newest]
    assert none == []


@pytest.mark.parametrize("odd", ["\x00", "'; DROP TABLE runs; --", "\ud800", "", "Z" * 500])
def test_odd_questions_find_nothing_and_break_nothing(database, odd):
    insert_run(database)
    assert pages(database, Selection(owner=odd)) == []
    cursor = to_cursor(Order("name", descending=False), Position(odd, RUN_ID))
    with database.read() as session:
        run_list.page(session, Selection(), order=Order("name", descending=False), cursor=cursor, limit=1)


values_of = {
    **dict.fromkeys(TEXTS, st.text()),
    **dict.fromkeys(WHOLE, st.none() | st.integers(0, 2**63 - 1)),
    **dict.fromkeys(NULLABLE - WHOLE, st.none() | st.floats(allow_nan=False, allow_infinity=False)),
    **dict.fromkeys(["dollars", "created"], st.floats(allow_nan=False, allow_infinity=False)),
}


@given(st.sampled_from(ORDERS).flatmap(lambda order: st.tuples(st.just(order), values_of[order.field])))
def test_a_cursor_is_read_as_it_was_written_and_only_by_its_order(case):
    order, value = case
    cursor = to_cursor(order, Position(value, RUN_ID))
    assert cursor.isascii()
    assert parse_cursor(order, cursor) == Position(value, RUN_ID)
    for other in ORDERS:
        if other != order:
            with pytest.raises(InvalidRequest, match=f"another order than {other}"):
                parse_cursor(other, cursor)


@given(st.text(max_size=60) | st.builds(lambda x: to_cursor(Order(), Position(x, RUN_ID)), st.text() | st.booleans()))
def test_no_other_text_is_a_cursor(odd):
    with pytest.raises(InvalidRequest, match="begin without a cursor"):
        parse_cursor(Order(), odd)


@given(
    field=st.sampled_from(FIGURES),
    sign=st.sampled_from(["<", "<=", ">", ">=", "="]),
    value=st.floats(allow_nan=False, allow_infinity=False),
    space=st.sampled_from(["", " ", "  "]),
)
def test_a_condition_is_read_as_it_is_meant(field, sign, value, space):
    assert parse_condition(f"{space}{field}{space}{sign}{space}{value!r}{space}") == Condition(field, sign, value)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("", "must compare a figure"),
        ("perplexity", "must compare a figure"),
        ("perplexity<", "must compare a figure"),
        ("perplexity<thirty", "must compare a figure"),
        ("perplexity<30 or 1=1", "must compare a figure"),
        ("perplexity<1e999", "not a number of usual size"),
        ("perplexity<1.2.3", "not a number of usual size"),
        ("perplexty<30", "did you mean perplexity"),
        ("zzz<30", "known are dollars"),
        ("created>3", "no such figure"),
    ],
)
def test_a_wrong_condition_is_refused_in_one_line(wrong, words):
    with pytest.raises(InvalidRequest, match=words) as refused:
        parse_condition(wrong)
    assert "\n" not in str(refused.value)
    assert refused.value.mistakes[0][0] == "where"


@given(st.text())
def test_any_text_is_read_or_refused_in_a_short_line(odd):
    for parse in (parse_condition, parse_order):
        with contextlib.suppress(InvalidRequest), shortly():
            parse(odd)


@contextlib.contextmanager
def shortly():
    try:
        yield
    except InvalidRequest as refused:
        if len(refused.detail) > 400:
            raise AssertionError(refused.detail) from refused
        raise


def test_a_run_has_its_figures_once_they_are_reported(api):
    run = api.submit()["id"]
    api.start(run)
    begun = (
        Event("run_started", data={"stages": ["evaluate", "export"]}, time=T0),
        Event("stage_started", "evaluate", time=T0),
    )
    trained = [
        Event("unit_finished", "seed", name, data={"steps": 1, "tokens": 50, "loss": 1.0}, time=T0)
        for name in ("seed", "extra")
    ]
    api.report(run, *begun, *trained, EVALUATED, EXPORTED)
    about = f"/v1/runs/{run}"
    figures = {"perplexity": 20.5, "bits_per_byte": 1.25, "held_out_loss": math.log(20.5), "active_parameters": 36_032}
    assert api.ann.get(about).json()["results"] == figures | {"tokens": None, "hours": None}
    api.report(run, Event("run_finished", data={"seconds": 7200.0}, time=T0 + 7200))
    api.bring(run, RunState.SUCCEEDED)
    [listed] = api.ann.get("/v1/runs").json()["items"]
    assert listed["results"] == figures | {"tokens": 100, "hours": 2.0}
    api.report(run, Event("stage_started", "evaluate", time=T0 + 7201))
    assert api.ann.get(about).json()["results"]["perplexity"] is None


@pytest.mark.parametrize("odd", [None, "x", [], {}, {"perplexity": math.inf, "bits_per_byte": True}, {"perplexity": 0}])
def test_odd_summaries_leave_no_figures(database, odd):
    run = insert_run(database)
    with database.write() as session:
        row = runs.lock(session, run.id)
        ingest.take(session, row, 0, [Event("stage_finished", "evaluate", data={"summary": odd})], T0)
        ingest.take(session, row, 1, [Event("stage_finished", "export", data={"summary": odd})], T0)
    found = reload(database, run)
    assert (found.bits_per_byte, found.held_out_loss, found.active_parameters) == (None, None, None)
    assert found.perplexity in (None, 0)


def test_an_upgrade_fills_the_figures_of_earlier_runs(empty_database):
    database = empty_database
    database.migrate("0007")
    rows = {"A": ("succeeded", {"elapsed": 7200.0}), "B": ("running", {"elapsed": 9.0}), "C": ("failed", {})}
    events = [
        ("evaluate", {"summary": {"perplexity": 99.0, "bits_per_byte": 9.0}}),
        ("evaluate", EVALUATED.data),
        ("export", EXPORTED.data),
        ("seed", {"summary": {"perplexity": 1.0}}),
    ]
    with database.write() as session:
        for name, (state, meter) in rows.items():
            session.execute(
                text(
                    "INSERT INTO runs (id, name, owner, tags, priority, state, version, config, directory, attempt, "
                    "futile, mark, mark_at_start, dollars, worker_seconds, meter, estimate, progress, next_position, "
                    "next_seq, created, queued, updated) VALUES "
                    "(:i, 'x', 'ann', '{}', 0, :s, 1, '{}', '/x', 0, 0, 0, 0, 1, '{}', :m, '{}', '{}', 0, 0, 1, 1, 1)"
                ),
                {"i": name, "s": state, "m": json.dumps(meter)},
            )
            for unit in ("seed", "finetune"):
                session.execute(
                    text(
                        "INSERT INTO units (run_id, unit, stage, status, step, steps, tokens, restarts, workers) "
                        "VALUES (:i, :u, 'seed', 'done', 1, 1, 50, 0, 1)"
                    ),
                    {"i": name, "u": unit},
                )
        for position, (stage, data) in enumerate(events):
            session.execute(
                text("INSERT INTO events VALUES ('A', :p, 1, 'stage_finished', :s, NULL, :d)"),
                {"p": position, "s": stage, "d": json.dumps(data)},
            )
        session.execute(
            text("INSERT INTO events VALUES ('C', 0, 1, 'stage_finished', 'evaluate', NULL, :d)"), {"d": "[1]"}
        )
    database.migrate()
    with database.read() as session:
        columns = (RunRow.perplexity, RunRow.bits_per_byte, RunRow.active_parameters, RunRow.tokens, RunRow.hours)
        found = {run_id: list(rest) for run_id, *rest in session.execute(select(RunRow.id, *columns))}
    assert found == {
        "A": [20.5, 1.25, 36_032, 100, 2.0],
        "B": [None, None, None, None, None],
        "C": [None, None, None, 100, None],
    }


def test_the_list_is_asked_for_in_the_query(api):
    made = [api.submit(name=name)["id"] for name in ("b", "a", "c")]
    with api.database.write() as session:
        for run_id, perplexity in zip(made, (30.0, 20.0, None), strict=True):
            session.execute(update(RunRow).where(RunRow.id == run_id).values(perplexity=perplexity))

    def names(**asked):
        answer = api.ann.get("/v1/runs", params=asked)
        assert answer.status_code == 200, answer.text
        return "".join(run["name"] for run in answer.json()["items"])

    assert (names(), names(order_by="created"), names(order_by="-name")) == ("cab", "bac", "cba")
    assert (names(order_by="perplexity"), names(order_by="-perplexity")) == ("abc", "bac")
    assert (names(where="perplexity<30"), names(where=["perplexity<31", "dollars<5"])) == ("a", "ab")
    assert (names(created_after=time.time() + 9), names(created_before=time.time() + 9)) == ("", "cab")
    first = api.ann.get("/v1/runs", params={"order_by": "perplexity", "limit": 1}).json()
    assert names(order_by="perplexity", cursor=first["next_cursor"]) == "bc"
    for asked, field, words in [
        ({"where": "perplexty<3"}, "where", "did you mean perplexity"),
        ({"order_by": "perplexy"}, "order_by", "did you mean perplexity"),
        ({"order_by": "name", "cursor": first["next_cursor"]}, "cursor", "another order"),
        ({"cursor": made[0]}, "cursor", "begin without"),
        ({"created_after": "inf"}, "created_after", "finite"),
    ]:
        refused = api.ann.get("/v1/runs", params=asked)
        assert refused.status_code == 422
        [mistake] = refused.json()["errors"]
        assert (mistake["field"], words in mistake["message"]) == (field, True), mistake


def test_a_note_is_kept_and_an_empty_one_removes_it(api):
    about = f"/v1/runs/{api.submit()['id']}"
    assert api.ann.patch(about, json={"note": " try a lower rate\nthen compare "}).json()["note"] == (
        "try a lower rate\nthen compare"
    )
    assert api.ann.get("/v1/runs").json()["items"][0]["note"].startswith("try")
    assert api.ann.patch(about, json={"priority": 1}).json()["note"].startswith("try")
    assert [api.ann.patch(about, json={"note": odd}).status_code for odd in ("x" * 2001, "\x1b[2J", "a\x00")] == [
        422
    ] * 3
    assert api.bob.patch(about, json={"note": "mine"}).status_code == 404
    assert api.reader.patch(about, json={"note": "mine"}).status_code == 403
    assert api.ann.patch(about, json={"note": ""}).json()["note"] is None
