"""Monthly dollars, prices and limits of owners in the queue, running runs, the meter and the file of `serve`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from databases import config
from hypothesis import given
from hypothesis import strategies as st
from reconciling import Scene
from sqlalchemy import text

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.events import Event
from service.database import audit, policies, quotas, runs, sharers
from service.domain.policies import Policies, Policy, Retention
from service.domain.quotas import Use, check_priority, month_of, next_month, priced
from service.domain.states import RunState
from service.errors import AgainstPolicy
from service.policies_file import load_policies
from service.serve import _store_policies
from service.settings import Settings

HOUR = 3600.0


@pytest.fixture
def scene(database, tmp_path):
    return Scene.on(database, tmp_path)


def limit(scene, owner="ann", **limits):
    with scene.database.write() as session:
        policies.put(session, owner, Policy(**limits), scene.now)


def use(scene, run_id, hours, pool="low_memory"):
    """Hold a worker for a number of hours, at the operator's price of this moment."""
    with scene.database.read() as session:
        run = runs.get(session, run_id)
        found = run.pools.at(pool)
        price = policies.of(session, run.owner).prices.get(found.resource, found.price_per_hour)
    held = {"hold": str(scene.now), "pool": pool, "workers": 1, "price_per_hour": price}
    scene.report(run_id, Event("workers_held", "submodels", data=held))
    scene.now += hours * HOUR
    scene.report(run_id, Event("heartbeat"))


def test_running_runs_are_stopped_with_a_checkpoint_once_the_month_is_used_up_and_queued_ones_wait_for_the_next(scene):
    limit(scene, prices={"low_mem_gpu": 1.0, "high_mem_gpu": 1.0}, dollars_per_month=2.0)
    run_id, other = scene.running(), scene.running(owner="bob")
    use(scene, run_id, 1)
    scene.round()
    assert scene.run(run_id).state == "running"
    use(scene, run_id, 1)
    scene.round(2)
    stopping = scene.run(run_id)
    assert (stopping.state, stopping.stop) == ("stopping", "month")
    assert scene.place(run_id).stop_file(1).read_text() == "month"
    assert scene.run(other).state == "running"
    scene.report(run_id, Event("run_stopped", data={"reason": "month"}))
    scene.jobs.ends(scene.job(run_id), 3)
    scene.round()
    ended = scene.run(run_id)
    assert (ended.state, ended.reason) == (
        "cancelled",
        "its owner's dollars for this month are used up; it can be resumed next month",
    )
    scene.change(run_id, RunState.QUEUED)
    scene.round()
    assert scene.run(run_id).reason == "its owner's $2.00 for this month are used up"
    scene.now = next_month(scene.now)
    scene.round()
    assert scene.run(run_id).state == "starting"


def test_dollars_are_those_of_the_month_in_which_they_are_metered(scene):
    run_id = scene.running()
    use(scene, run_id, 1)
    scene.now = next_month(scene.now)
    with scene.database.read() as session:
        assert quotas.use_of(session, "ann", scene.now).dollars == 0
        assert quotas.use_of(session, "ann", scene.now - 1).dollars == scene.run(run_id).dollars == pytest.approx(0.35)


def test_a_queued_run_waits_where_its_pool_is_no_longer_allowed_or_the_disk_is_full(scene):
    run_id = scene.submit()
    limit(scene, resources=["low_mem_gpu"])
    scene.round()
    assert scene.run(run_id).reason == "its owner may no longer use high_mem_gpu"
    limit(scene, disk_bytes=10)
    with scene.database.write() as session:
        sharers.measured(session, run_id, 10, {}, scene.now)
    scene.round()
    assert scene.run(run_id).reason == "its owner's runs and data sets fill the 0.0 GB of disk that they may use"
    limit(scene)
    scene.round()
    assert scene.run(run_id).state == "starting"


def test_an_owners_own_prices_are_metered(scene):
    with scene.database.write() as session:
        policies.replace(
            session,
            Policies(default=Policy(prices={"low_mem_gpu": 1.0}), owners={"bob": Policy(prices={"low_mem_gpu": 3.0})}),
            scene.now,
        )
    mine, his = scene.running(), scene.running(owner="bob")
    use(scene, mine, 1)
    use(scene, his, 1)
    assert (scene.run(mine).dollars, scene.run(his).dollars) == (pytest.approx(1.0), pytest.approx(3.0))


def test_owners_have_active_runs_of_their_own(scene):
    limit(scene, "ann", active_runs=1)
    limit(scene, "bob", active_runs=None)
    for owner in ("ann", "ann", "bob", "bob", "bob"):
        scene.submit(owner=owner)
    scene.round()
    with scene.database.read() as session:
        assert runs.owner_counts(session, [RunState.STARTING]) == {"ann": 1, "bob": 3}


def test_what_an_entry_leaves_out_is_as_in_the_default_and_null_is_no_limit(database):
    wanted = Policies.model_validate(
        {
            "default": {"dollars_per_month": 5, "prices": {"a": 1, "b": 2}, "retention": {"days": 3}},
            "owners": {"ann": {"dollars_per_month": None, "prices": {"b": 3}}, "bob": {"retention": {}}},
        }
    )
    with database.write() as session:
        policies.replace(session, wanted, 1.0)
        stored = policies.load(session)
        assert policies.of(session, "ann") == stored.of("ann")
        assert policies.of(session, "eve") == stored.default
    assert stored.model_dump(exclude_unset=True) == wanted.model_dump(exclude_unset=True)
    assert (stored.of("ann").dollars_per_month, stored.of("ann").prices) == (None, {"a": 1, "b": 3})
    assert (stored.of("bob").dollars_per_month, stored.of("bob").retention) == (5, Retention())
    assert stored.of("ann").retention.days == 3


@given(
    st.floats(0, 1e9),
    st.dictionaries(st.sampled_from(["low_mem_gpu", "high_mem_gpu", "t4", "other"]), st.floats(0, 1e4)),
)
def test_every_listed_price_is_the_operators_and_every_other_the_configurations(asked, prices):
    types = [{"name": "t4", "resource": "t4", "memory_gb": 24, "price_per_hour": asked, "speed": 1}]
    wanted = config(pools={"low_memory": {"price_per_hour": asked, "types": types}})
    made, notes = priced(wanted, prices)
    pools, before = made.pools, wanted.pools
    for pool, earlier in (
        (pools.low_memory, before.low_memory),
        (pools.high_memory, before.high_memory),
        (pools.low_memory.types[0], before.low_memory.types[0]),
    ):
        assert pool.price_per_hour == prices.get(pool.resource, earlier.price_per_hour)
    assert made.model_copy(update={"pools": before}) == wanted
    assert priced(made, prices)[0] == made
    assert any("t4" in note for note in notes) == (prices.get("t4") != asked)


@given(st.integers(-100, 100), st.integers(-100, 100))
def test_no_priority_above_the_highest(priority, highest):
    policy = Policy(highest_priority=highest)
    if priority <= highest:
        check_priority(priority, policy)
    else:
        with pytest.raises(AgainstPolicy):
            check_priority(priority, policy)


@given(st.floats(3e8, 7e9))
def test_months_follow_each_other(now):
    moment = datetime.fromtimestamp(now, UTC)
    following = next_month(now)
    assert following > now
    assert month_of(following - 0.5) == month_of(now) == f"{moment:%Y-%m}"
    assert month_of(following) > month_of(now)


def test_an_owner_without_runs_uses_nothing(database):
    with database.read() as session:
        assert quotas.use_of(session, "eve", time.time()) == quotas.load(session, time.time()).use("eve") == Use()


def test_a_policies_file_holds_and_is_locked(database, tmp_path):
    file = tmp_path / "policies.yaml"
    file.write_text("default:\n  prices: {low_mem_gpu: 0.3}\nowners:\n  ann: {highest_priority: 5}\n")
    settings = Settings(state_dir=tmp_path / "state", policies=file)
    for _ in range(2):
        _store_policies(settings, database)
    with database.read() as session:
        assert policies.load(session).of("ann").highest_priority == 5
        assert [entry.action for entry in audit.page(session, cursor=None, limit=9)[0]] == ["policies.set"]
    file.write_text("default: {highest_priority: 1000}")
    with pytest.raises(ConfigError, match=r"default\.highest_priority"):
        load_policies(file)


def test_the_example_file_is_one():
    shown = load_policies(Path(__file__).parents[2] / "cluster_yaml" / "policies.yaml")
    assert set(shown.default.model_dump(exclude_unset=True)) == set(Policy.model_fields), "it shows every setting"
    assert shown.of("ann").prices == {"low_mem_gpu": 0.35, "high_mem_gpu": 2.0}


def test_the_migration_keeps_every_run_and_its_events(empty_database):
    empty_database.migrate("0001")
    with empty_database.write() as session:
        session.execute(
            text(
                "INSERT INTO runs (id, name, owner, tags, priority, state, version, config, directory, attempt, "
                "futile, mark, mark_at_start, dollars, worker_seconds, meter, estimate, progress, next_position, "
                "next_seq, created, queued, updated) "
                "VALUES ('01JABCDEFGHJKMNPQRSTVWXYZ0', 'demo', 'ann', '{}', 0, 'queued', 1, '{}', '/x', 0, "
                "0, 0, 0, 0, '{}', '{}', '{}', '{}', 1, 0, 1, 1, 1)"
            )
        )
        session.execute(
            text(
                "INSERT INTO events (run_id, position, time, type, data) "
                "VALUES ('01JABCDEFGHJKMNPQRSTVWXYZ0', 0, 1, 'state', '{}')"
            )
        )
    empty_database.migrate()
    with empty_database.read() as session:
        [run] = runs.in_states(session, [RunState.QUEUED])
        assert (run.notes, run.kept, run.disk_bytes) == (None, False, None)
        assert session.execute(text("SELECT count(*) FROM events")).scalar() == 1
    empty_database.migrate("0001")
    with empty_database.read() as session:
        assert session.execute(text("SELECT count(*) FROM events")).scalar() == 1
