from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from databases import T0, insert_run, reload, whole_stream
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from moedisco_ray.core.records.events import Event
from service.background import observed
from service.database import ingest, metrics, policies, runs, stream
from service.database.tables import Point, UnitRow
from service.domain.policies import Policy
from service.errors import NotFound

FIXTURE_OK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
STAGES = ["corpus", "seed", "submodels", "export"]


def report(database, run, first, events, price=None, now=T0):
    with database.write() as session:
        if price is not None:
            policies.put(session, run.owner, Policy(prices={"low_mem_gpu": price}), now)
        return ingest.take(session, runs.lock(session, run.id), first, events, now)


def step(number, unit="submodel-0", stage="submodels", **data):
    figures = {
        "step": number,
        "steps": 100,
        "tokens": 10 * number,
        "loss": 5.0 - number / 100,
        "lr": 0.1,
        "grad_norm": 1.0,
        "tokens_per_second": 50.0,
    }
    return Event("progress", stage, unit, figures | data, T0 + number)


def started(time=T0):
    return Event("run_started", data={"name": "demo", "stages": STAGES}, time=time)


def held(hold, pool, workers, time, **data):
    return Event("workers_held", "seed", data={"hold": hold, "pool": pool, "workers": workers, **data}, time=time)


def points(database, run):
    with database.read() as session:
        stored = select(Point.unit, Point.step, Point.loss).where(Point.run_id == run.id)
        return [tuple(row) for row in session.execute(stored.order_by(Point.unit, Point.step))]


def evaluated(number, loss=3.0, unit="submodel-0"):
    figures = {"step": number, "tokens": 10 * number, "held_out_loss": loss}
    return Event("evaluation", "submodels", unit, figures, T0 + number)


def held_out(database, run):
    with database.read() as session:
        curves = metrics.series(session, run.id, "held_out_loss", None, 100)
    return {curve.unit: (curve.steps, curve.tokens, curve.values) for curve in curves}


def unit(database, run):
    with database.read() as session:
        [found] = runs.units(session, run.id)
    return found


def columns(row):
    return {key: value for key, value in vars(row).items() if key not in ("_sa_instance_state", "run_id")}


def image(database, run):
    """Everything that ingest leaves behind."""
    row = reload(database, run)
    with database.read() as session:
        units = [columns(each) for each in runs.units(session, run.id)]
    events = [
        (each.position, each.type, each.stage, each.unit, each.time, each.data) for each in whole_stream(database, run)
    ]
    folded = row.progress, row.mark, row.meter, row.worker_seconds, round(row.dollars, 9), row.next_seq
    return folded, units, events, points(database, run), held_out(database, run)


UNITS = st.sampled_from(["submodel-0", "submodel-1"])
DRIVER_EVENTS = st.one_of(
    st.builds(step, st.integers(0, 12), UNITS),
    st.builds(evaluated, st.integers(0, 12), st.sampled_from([2.5, math.nan]), UNITS),
    st.builds(
        lambda unit: Event("unit_started", "submodels", unit, {"steps": 100, "workers": 2, "node": "10.0.0.1"}, T0),
        UNITS,
    ),
    st.builds(lambda unit: Event("worker_restarted", "submodels", unit, {"reason": "lost"}, T0), UNITS),
    st.builds(
        lambda unit: Event("unit_finished", "submodels", unit, {"steps": 100, "tokens": 1000, "loss": 2.0}, T0 + 9),
        UNITS,
    ),
    st.builds(started),
    st.builds(
        lambda stage, kind: Event(kind, stage, None, {"seconds": 1.5}, T0 + 1),
        st.sampled_from(STAGES),
        st.sampled_from(["stage_started", "stage_skipped", "stage_finished"]),
    ),
    st.builds(lambda hold, time: held(hold, "low_memory", 2, T0 + time), st.sampled_from("ab"), st.integers(0, 100)),
    st.builds(
        lambda hold, time: Event("workers_released", "seed", None, {"hold": hold}, T0 + time),
        st.sampled_from("ab"),
        st.integers(0, 100),
    ),
    st.builds(lambda time: Event("heartbeat", time=T0 + time), st.integers(0, 100)),
    st.builds(
        lambda kind: Event(kind, data={"message": "no", "reason": "cancelled"}, time=T0 + 50),
        st.sampled_from(["run_failed", "run_stopped", "run_finished"]),
    ),
)


@FIXTURE_OK
@example(events=[started(), Event("unit_started", "submodels", "submodel-0", {"steps": 100}, T0)], reports=[(0, 1)])
@given(
    events=st.lists(DRIVER_EVENTS, max_size=40),
    reports=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), max_size=20),
)
def test_reports_in_any_order_with_repeats_overlaps_and_gaps_add_up_to_the_whole(database, events, reports):
    whole, pieces = insert_run(database), insert_run(database)
    report(database, whole, 0, events)
    wanted = 0
    for first, length in reports:
        piece = events[first : first + length]
        following = report(database, pieces, first, piece)
        assert following == (max(wanted, first + len(piece)) if first <= wanted else wanted)
        wanted = following
    assert report(database, pieces, wanted, events[wanted:]) == len(events)
    assert image(database, pieces) == image(database, whole)


def test_a_line_after_a_gap_waits_until_the_gap_is_filled(database):
    run = insert_run(database)
    assert report(database, run, 0, [step(1)]) == 1
    assert report(database, run, 2, [step(3)]) == 1
    assert report(database, run, 1, [step(2), step(3)]) == 3
    assert [number for _, number, _ in points(database, run)] == [1, 2, 3]


def test_a_new_driver_begins_again_at_its_first_line_once(database):
    run = insert_run(database)
    assert report(database, run, 0, [started(), step(1), step(2), step(3)]) == 4

    def begin(line, *events):
        with database.write() as session:
            row = runs.lock(session, run.id)
            ingest.rewind(session, row, line)
            return ingest.take(session, row, line, events, T0)

    assert begin(2, step(2)) == 4  # the driver of this attempt has begun
    with database.write() as session:
        row = runs.lock(session, run.id)
        row.progress = observed.awaiting(row.progress)
    warning = Event("warning", data={"message": "x"}, time=T0)
    assert [begin(2, warning), begin(2, warning), begin(2, warning, started(), step(2))] == [3, 3, 5]
    assert [event.type for event in whole_stream(database, run)][5:] == ["warning", "run_started", "progress"]
    assert begin(2, warning) == 5


def test_the_same_report_from_many_threads_is_stored_once(database):
    run = insert_run(database)
    events = [step(number) for number in range(50)]
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda first: report(database, run, first, events[first:]), [0] * 6))
    assert answers == [50] * 6
    assert [event.position for event in whole_stream(database, run)] == list(range(51))
    assert len(points(database, run)) == 50


def test_a_driver_and_the_service_write_one_stream_without_gaps(database):
    run = insert_run(database)

    def drive():
        for number in range(40):
            report(database, run, number, [step(number)])

    def serve():
        for _ in range(40):
            with database.write() as session:
                stream.append(session, runs.get(session, run.id), [Event("heartbeat", time=T0)], T0)

    with ThreadPoolExecutor(2) as threads:
        for work in [threads.submit(drive), threads.submit(serve)]:
            work.result()
    events = whole_stream(database, run)
    assert [event.position for event in events] == list(range(81))
    assert reload(database, run).next_position == 81
    assert [event.data["step"] for event in events if event.type == "progress"] == list(range(40))


def test_steps_trained_again_after_a_restart_replace_the_ones_that_were_lost(database):
    run = insert_run(database)
    report(database, run, 0, [*(step(number) for number in range(1, 9)), step(3, unit="submodel-1")])
    report(database, run, 9, [step(5, loss=1.0), step(6, loss=0.9)])
    assert points(database, run) == [
        *(("submodel-0", number, 5.0 - number / 100) for number in range(1, 5)),
        ("submodel-0", 5, 1.0),
        ("submodel-0", 6, 0.9),
        ("submodel-1", 3, 4.97),
    ]


def test_a_unit_lives_through_start_restart_and_end(database):
    run = insert_run(database)
    begun = Event(
        "unit_started", "submodels", "submodel-0", {"steps": 100, "tokens": 999, "workers": 2, "node": "10.0.0.7"}, T0
    )
    assert report(database, run, 0, [begun, step(10)]) == 2
    now = unit(database, run)
    assert (now.status, now.step, now.steps, now.tokens, now.workers, now.node, now.started) == (
        "running",
        10,
        100,
        100,
        2,
        "10.0.0.7",
        T0,
    )
    report(database, run, 2, [Event("worker_restarted", "submodels", "submodel-0", {"reason": "lost"}, T0 + 20)])
    assert (unit(database, run).status, unit(database, run).restarts) == ("restarting", 1)
    finished = Event("unit_finished", "submodels", "submodel-0", {"steps": 100, "tokens": 1000, "loss": 2.0}, T0 + 90)
    report(database, run, 3, [step(5), finished])
    now = unit(database, run)
    assert (now.status, now.step, now.tokens, now.loss, now.ended, now.started) == ("done", 100, 1000, 2.0, T0 + 90, T0)


def test_a_new_driver_resets_the_stages_and_the_final_event(database):
    run = insert_run(database)
    report(
        database,
        run,
        0,
        [
            started(),
            Event("stage_started", "corpus", time=T0 + 1),
            Event("stage_finished", "corpus", data={"seconds": 2.0}, time=T0 + 3),
            Event("stage_started", "seed", time=T0 + 3),
            Event("run_failed", data={"message": "no"}, time=T0 + 7),
        ],
    )
    progress = reload(database, run).progress
    assert progress["stages"]["corpus"] == {"status": "done", "started": T0 + 1, "seconds": 2.0}
    assert progress["stages"]["seed"] == {"status": "failed", "started": T0 + 3, "seconds": 4.0}
    assert progress["ended"] == {"type": "run_failed", "message": "no", "time": T0 + 7}
    report(database, run, 5, [started(), Event("stage_skipped", "corpus", time=T0 + 9)])
    progress = reload(database, run).progress
    assert "ended" not in progress
    assert [stage["status"] for stage in progress["stages"].values()] == ["reused", "waiting", "waiting", "waiting"]


def test_only_the_first_and_final_events_of_a_driver_make_a_decision_stale(database):
    run = insert_run(database)
    versions = []
    lines = [started(), step(1), Event("heartbeat", time=T0), Event("run_stopped", data={"reason": "budget"}, time=T0)]
    for seq, event in enumerate(lines):
        report(database, run, seq, [event])
        versions.append(reload(database, run).version)
    assert versions == [2, 2, 2, 3]


def test_the_mark_grows_only_with_new_progress(database):
    run = insert_run(database)
    seen = []
    lines = [
        step(10),
        step(4),
        step(10),
        step(11),
        step(1, unit="submodel-1"),
        Event("stage_finished", "corpus", data={}, time=T0),
        started(),
        Event("stage_skipped", "corpus", time=T0),
    ]
    for seq, event in enumerate(lines):
        report(database, run, seq, [event])
        seen.append(reload(database, run).mark)
    assert seen[:5] == [10, 10, 10, 11, 12]
    assert seen[5] > 10**9
    assert seen[5:] == [seen[5]] * 3


def test_a_hold_keeps_the_price_at_which_it_began(database):
    run = insert_run(database)
    report(
        database,
        run,
        0,
        [held("a", "low_memory", 2, T0, price_per_hour=1.0), Event("heartbeat", time=T0 + 1800)],
        price=1.0,
    )
    later = held("b", "low_memory", 1, T0 + 1800, price_per_hour=3.0), Event("heartbeat", time=T0 + 3600)
    report(database, run, 2, later, price=3.0)
    now = reload(database, run)
    assert now.worker_seconds == {"low_memory": 9000.0}
    assert now.dollars == pytest.approx(2 * 1.0 + 0.5 * 3.0)


@pytest.mark.parametrize("stated", [0.0, 0.34, -1, math.nan, math.inf, 1e300, True, "0.5", None, []])
def test_a_price_that_cannot_be_true_is_replaced_by_the_present_one(database, stated):
    """The configuration's price is 0.35; a driver cannot make its hours cheaper with what it writes."""
    run = insert_run(database)
    report(
        database,
        run,
        0,
        [held("a", "low_memory", 1, T0, price_per_hour=stated), Event("heartbeat", time=T0 + 3600)],
        price=2.0,
    )
    assert reload(database, run).dollars == pytest.approx(2.0)
    assert whole_stream(database, run)[1].data["price_per_hour"] == 2.0


def test_where_the_operator_has_set_no_price_the_configurations_holds(database):
    run = insert_run(database, pools={"high_memory": {"price_per_hour": 2.0}})
    released = Event("workers_released", "finetune", data={"hold": "a"}, time=T0 + 900)
    report(database, run, 0, [held("a", "high_memory", 4, T0), released])
    assert reload(database, run).dollars == pytest.approx(2.0)


@FIXTURE_OK
@given(times=st.lists(st.integers(0, 3600), min_size=1, max_size=20))
def test_what_was_charged_never_shrinks(database, times):
    run = insert_run(database)
    charged = 0.0
    for seq, time in enumerate(times):
        kind = [held("a", "low_memory", 1, T0 + time), Event("workers_released", data={"hold": "a"}, time=T0 + time)][
            seq % 2
        ]
        report(database, run, seq, [kind])
        now = reload(database, run).dollars
        assert now >= charged - 1e-12  # sums in another order differ by rounding
        charged = now


def test_a_loss_that_is_not_finite_is_stored_as_none_and_listed(database):
    run = insert_run(database)
    report(database, run, 0, [step(1), step(2, loss=math.nan, grad_norm=math.inf), step(3)])
    assert [loss for _, _, loss in points(database, run)] == [4.99, None, 4.97]
    data = whole_stream(database, run)[2].data
    assert (data["loss"], data["grad_norm"], data["not_finite"]) == (None, None, {"loss": "nan", "grad_norm": "inf"})
    with database.read() as session:
        [curve] = metrics.series(session, run.id, "loss", None, 100)
    assert (curve.steps, curve.count) == ([1, 3], 2)


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=8)
    | st.just("\x00\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["step", "steps", "tokens", "loss", "hold", "pool", "workers", "stages", "seconds", "node", "message", "\x00"]
)


@FIXTURE_OK
@given(
    events=st.lists(
        st.builds(
            Event,
            st.sampled_from(
                [
                    "progress",
                    "unit_started",
                    "unit_finished",
                    "workers_held",
                    "workers_released",
                    "run_started",
                    "run_failed",
                    "stage_started",
                    "stage_finished",
                    "clusters",
                    "\x00" * 40,
                    "novel",
                ]
            ),
            st.none() | st.just("seed") | st.text(max_size=50),
            st.none() | st.just("seed") | st.text(max_size=90),
            st.dictionaries(KEYS, ODD, max_size=5),
            st.floats(0, 1e11),
        ),
        max_size=8,
    )
)
def test_nothing_a_driver_says_can_stop_its_reports(database, events):
    run = insert_run(database)
    assert report(database, run, 0, events) == len(events)
    assert len(whole_stream(database, run)) == 1 + len(events)
    with database.read() as session:
        metrics.series(session, run.id, "loss", None, 10)


def test_reports_of_a_deleted_run_are_refused(database):
    run = insert_run(database)
    with database.write() as session:
        runs.delete(session, runs.lock(session, run.id))
    with pytest.raises(NotFound), database.write() as session:
        ingest.take(session, run, 0, [step(1)], T0)


def test_node_types_of_a_mixed_pool_are_charged_each_at_its_own_price(database):
    types = [
        {"name": name, "resource": f"{name}_gpu", "memory_gb": 16, "price_per_hour": price, "speed": 1}
        for name, price in (("t4", 0.5), ("l4", 4.0))
    ]
    run = insert_run(database, pools={"low_memory": {"types": types}})
    report(
        database,
        run,
        0,
        [
            held("a", "low_memory.t4", 2, T0),
            held("b", "low_memory.l4", 1, T0),
            held("c", "low_memory.gone", 9, T0),
            Event("heartbeat", time=T0 + 3600),
        ],
    )
    now = reload(database, run)
    assert now.worker_seconds == {"low_memory.t4": 7200.0, "low_memory.l4": 3600.0}
    assert now.dollars == pytest.approx(2 * 0.5 + 4.0)


def test_a_submodel_that_is_let_go_has_ended_where_it_was(database):
    run = insert_run(database)
    let_go = Event(
        "unit_let_go", "submodels", "submodel-0", {"contribution": "checkpoint", "steps": 5, "tokens": 50}, time=T0 + 9
    )
    report(database, run, 0, [started(), step(7), let_go])
    with database.read() as session:
        [unit] = session.scalars(select(UnitRow).where(UnitRow.run_id == run.id))
        assert (unit.status, unit.step, unit.ended) == ("done", 7, T0 + 9)


def test_held_out_losses_and_loads_of_experts_are_curves_of_their_own(database):
    run = insert_run(database)
    first = [started(), step(1, largest_load=1.5, dead_experts=2), evaluated(1, 4.0), step(2, largest_load=1.25)]
    report(database, run, 0, [*first, evaluated(2, 3.5), evaluated(4, 3.0)])
    assert held_out(database, run) == {"submodel-0": ([1, 2, 4], [10, 20, 40], [4.0, 3.5, 3.0])}
    with database.read() as session:
        [load] = metrics.series(session, run.id, "largest_load", None, 100)
        [dead] = metrics.series(session, run.id, "dead_experts", None, 100)
    assert (load.steps, load.values, dead.steps, dead.values) == ([1, 2], [1.5, 1.25], [1], [2])
    # A worker that was lost measures step 2 again.
    report(database, run, len(first) + 2, [evaluated(2, 3.25)])
    assert held_out(database, run) == {"submodel-0": ([1, 2], [10, 20], [4.0, 3.25])}
