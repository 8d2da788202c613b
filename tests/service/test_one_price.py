"""Everyone who shows what a run costs shows the same dollars, also after a change of prices."""

from __future__ import annotations

import json

import pytest
from api_client import service
from databases import config, insert_run, migrate, reload
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.cli.display.state import RunState
from moedisco_ray.cli.series import bill_points
from moedisco_ray.core.records.bill import idle_in_words
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.records.metered import metered_bill
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.records.prices import PriceTag
from moedisco_ray.core.records.report import build_report
from moedisco_ray.core.store.artifacts import write_json
from service.database import ingest, policies, quotas, runs
from service.database.session import Database
from service.domain.policies import Policy

T0 = 1_800_000_000.0
POOLS = {
    "low_memory": {
        "types": [
            {"name": name, "resource": f"{name}_gpu", "memory_gb": 16, "price_per_hour": price, "speed": 1}
            for name, price in (("t4", 0.5), ("l4", 4.0))
        ]
    }
}
KEYS = ["low_memory.t4", "low_memory.l4", "high_memory"]
TAGS = ["t4_gpu", "l4_gpu", "high_mem_gpu"]


def held(hold, pool, workers, time, **data):
    return Event("workers_held", "submodels", data={"hold": hold, "pool": pool, "workers": workers, **data}, time=time)


STEPS = st.lists(
    st.tuples(
        st.floats(0, 4000),
        st.one_of(
            st.tuples(st.just("hold"), st.integers(0, 3), st.sampled_from(KEYS), st.integers(1, 4)),
            st.tuples(st.just("free"), st.sampled_from(KEYS), st.integers(0, 3)),
            st.tuples(st.just("release"), st.integers(0, 3)),
            st.tuples(st.just("prices"), st.dictionaries(st.sampled_from(TAGS), st.floats(0.5, 100), max_size=3)),
            st.just(("heartbeat",)),
            st.just(("run_started",)),
            st.just(("report",)),
        ),
    ),
    max_size=14,
)


def driven(steps, path, store):
    """The events of a driver whose prices change, and the expected dollars; `store` gets what a service would."""
    clock = [T0]
    wanted = config(pools=POOLS)
    tag = PriceTag(wanted.pools, lambda: clock[0])
    log, prices, holds, expected = EventLog(path, (), tag), {}, {}, 0.0
    for later, (what, *of) in steps:
        before = clock[0]
        clock[0] += later
        for workers, price in holds.values():
            expected += workers * (clock[0] - before) / 3600 * price  # of a clock that counts in 2^-22 s
        log(Event("heartbeat", time=clock[0]))
        match what:
            case "hold":
                name, pool, workers = of
                found = wanted.pools.at(pool)
                holds[name] = workers, prices.get(found.resource, found.price_per_hour)
                log(held(str(name), pool, workers, clock[0]))
            case "free":
                log(Event("slots_free", data={"pool": of[0], "slots": of[1]}, time=clock[0]))
            case "release":
                holds.pop(of[0], None)
                log(Event("workers_released", "submodels", data={"hold": str(of[0])}, time=clock[0]))
            case "prices":
                prices |= of[0]
                tag.change(prices)
                store(EventLog.read(path), prices)
            case "run_started":
                holds.clear()
                log(Event("run_started", data={"stages": ["submodels"]}, time=clock[0]))
            case "report":
                store(EventLog.read(path), None)
    log.close()
    store(EventLog.read(path), None)
    return wanted, expected


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    path = tmp_path_factory.mktemp("prices") / "service.sqlite3"
    path.touch()
    database = Database(f"sqlite:///{path}")
    migrate(database, f"sqlite:///{path}")
    yield database
    database.close()


@settings(deadline=None, max_examples=40)
@given(STEPS)
def test_all_views_add_up_the_same_dollars(database, tmp_path_factory, steps):
    """Terminal, report, trackers, the service's total, bill and month: one sum for any holds and changes of prices."""
    directory = tmp_path_factory.mktemp("run")
    run = insert_run(database, owner=f"o{directory.name}"[:60], pools=POOLS)

    def store(events, prices):
        with database.write() as session:
            row = runs.lock(session, run.id)
            ingest.take(session, row, row.next_seq, events[row.next_seq :], T0)
            if prices is not None:
                policies.put(session, run.owner, Policy(prices=dict(prices)), T0)

    wanted, expected = driven(steps, directory / "events.jsonl", store)
    meter, terminal = Meter(), RunState(wanted)
    for event in EventLog.read(directory / "events.jsonl"):
        meter.update(event)
        terminal.update(event)
    bill, row = metered_bill(meter, wanted), reload(database, run)
    stored = metered_bill(Meter.from_dict(json.loads(json.dumps(row.meter))), row.settings)
    write_json(directory / "config.json", wanted.model_dump(mode="json"))
    assert bill.dollars == pytest.approx(expected)
    assert build_report(directory, wanted).bill == bill
    assert terminal.dollars() == idle_in_words(bill)
    assert bill_points(bill).values["bill/dollars"] == bill.dollars
    assert (stored.lines, stored.idle, row.dollars) == (bill.lines, bill.idle, bill.dollars)
    with database.read() as session:
        assert quotas.owner_dollars(session, run.owner, T0) == pytest.approx(bill.dollars)


def test_a_run_shows_one_cost_after_the_operator_has_changed_the_price(tmp_path):
    """The bill's total and the metered dollars that budgets compare are one number, and what was charged stays.

    Before (af276e38): `money.dollars` was 1.35, the second hour at the new price, and `bill.dollars` 0.70.
    """
    with service(tmp_path) as made:
        run = made.submit()["id"]
        made.start(run)
        stated = {"price_per_hour": 0.35}
        made.report(
            run, Event("run_started", data={"stages": ["submodels"]}, time=T0), held("a", "low_memory", 1, T0, **stated)
        )
        made.report(run, Event("heartbeat", time=T0 + 3600))
        with made.database.write() as session:
            policies.put(session, "ann", Policy(prices={"low_mem_gpu": 1.0}), T0)
        made.report(run, Event("heartbeat", time=T0 + 7200))
        shown = made.ann.get(f"/v1/runs/{run}").json()
        assert shown["money"]["dollars"] == pytest.approx(shown["bill"]["dollars"])
        assert shown["bill"]["dollars"] == pytest.approx(0.70)


def test_show_keeps_what_was_charged_when_the_configuration_has_another_price(tmp_path):
    """A run that is continued with another price has paid for its earlier hours what they cost then.

    Before (af276e38): `show` multiplied all hours by the price in `config.json`: $7.00.
    """
    write_json(tmp_path / "config.json", config(pools={"low_memory": {"price_per_hour": 7.0}}).model_dump(mode="json"))
    log = EventLog(tmp_path / "events.jsonl")
    log(Event("run_started", data={"stages": ["submodels"]}, time=T0))
    log(held("a", "low_memory", 1, T0, price_per_hour=0.35))
    log(Event("run_stopped", data={"reason": "cancelled"}, time=T0 + 3600))
    log.close()
    shown = CliRunner().invoke(app, ["show", str(tmp_path), "--json"])
    assert json.loads(shown.stdout)["bill"]["dollars"] == pytest.approx(0.35)
