"""Retention deletes finished runs a day after it announced it, on record, but not kept runs and starts of others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reconciling import Scene

from service import run_homes
from service.background.housekeeping import Housekeeping
from service.database import audit, idempotency, policies, runs, sharers
from service.domain.policies import Policy, Retention
from service.domain.retention import NOTICE_SECONDS, FinishedRun, announced, due_runs, named_runs
from service.domain.states import RunState

DAY = 24 * 3600.0


@pytest.fixture
def scene(database, tmp_path):
    return Scene.on(database, tmp_path)


def tidy(scene):
    Housekeeping(scene.database, scene.jobs, scene.settings.roots, scene.settings.session_idle_seconds).round(scene.now)


def limit(scene, owner="ann", **rules):
    with scene.database.write() as session:
        policies.put(session, owner, Policy(retention=Retention(**rules)), scene.now)


def finished(scene, *, files=True, **asked):
    """A run that has succeeded, with a directory."""
    run_id = scene.submit(**asked)
    scene.change(run_id, RunState.STARTING, attempt=1)
    scene.change(run_id, RunState.SUCCEEDED)
    if files:
        directory = scene.place(run_id).directory
        (directory / "model").mkdir(parents=True)
        (directory / "model" / "weights").write_bytes(b"x" * 1000)
    return run_id


def exists(scene, run_id):
    with scene.database.read() as session:
        return runs.get(session, run_id) is not None


def entries(scene):
    with scene.database.read() as session:
        return [
            (entry.action, entry.owner, entry.target, entry.detail)
            for entry in audit.page(session, cursor=None, limit=50)[0]
        ]


def test_a_run_is_announced_then_removed_with_its_files_and_that_is_on_record(scene):
    limit(scene, days=30)
    run_id = finished(scene)
    ended, home = scene.run(run_id).ended, scene.place(run_id).home
    tidy(scene)
    assert scene.run(run_id).expires_at == ended + 30 * DAY
    scene.now = ended + 30 * DAY - 1
    tidy(scene)
    assert home.exists()
    scene.now += 1
    tidy(scene)
    assert not exists(scene, run_id)
    assert list(scene.settings.output_roots[0].iterdir()) == []
    (removed, by, target, detail), announcement = entries(scene)[:2]
    assert (removed, by, target) == ("run.removed", "service", run_id)
    assert detail == {
        "name": "demo",
        "owner": "ann",
        "why": "finished runs are kept for 30 days",
        "ended": ended,
        "disk_bytes": 1000,
    }
    assert announcement[0] == "run.expiring"
    assert announcement[3]["expires_at"] == ended + 30 * DAY


def test_an_idempotency_key_is_forgotten_after_a_day(scene):
    run_id = scene.submit()
    with scene.database.write() as session:
        idempotency.remember(session, owner="ann", key="k", body_hash=b"0" * 32, run_id=run_id, now=scene.now)
    for later, is_known in ((DAY - 1, True), (DAY + 1, False)):
        Housekeeping(scene.database, scene.jobs, scene.settings.roots, 3600.0).round(scene.now + later)
        with scene.database.write() as session:
            assert (idempotency.find(session, "ann", "k", scene.now) is not None) == is_known


def test_a_rule_that_is_new_removes_old_runs_no_sooner_than_in_a_day(scene):
    old = finished(scene)
    scene.now += 100 * DAY
    limit(scene, days=30)
    tidy(scene)
    assert scene.run(old).expires_at == scene.now + NOTICE_SECONDS
    tidy(scene)
    assert exists(scene, old)
    scene.now += NOTICE_SECONDS
    tidy(scene)
    assert not exists(scene, old)


def test_only_the_newest_finished_runs_are_kept(scene):
    limit(scene, finished_runs=2)
    made = []
    for _ in range(3):
        made.append(finished(scene))
        scene.now += 10
    tidy(scene)
    assert [scene.run(each).expires_at for each in made[1:]] == [None, None]
    scene.now += NOTICE_SECONDS
    tidy(scene)
    assert [exists(scene, each) for each in made] == [False, True, True]


def test_a_kept_run_stays(scene):
    limit(scene, days=1)
    run_id = finished(scene)
    with scene.database.write() as session:
        runs.amend(session, runs.lock(session, run_id), now=scene.now, kept=True)
    scene.now += 30 * DAY
    for _ in range(2):
        tidy(scene)
        scene.now += 2 * DAY
    assert exists(scene, run_id)
    assert scene.run(run_id).expires_at is None


@pytest.mark.parametrize("place", ["{home}/demo/model", "run://{run}/model"])
@pytest.mark.parametrize("ended", [RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED])
def test_a_start_stays_until_the_run_that_reads_it_has_succeeded_or_is_gone(scene, place, ended):
    limit(scene, days=1)
    start = finished(scene)
    tidy(scene)
    path = place.format(home=scene.place(start).home, run=start)
    follower = scene.submit(evaluation={"lm_eval": [path]})

    def days(count):
        for _ in range(count):
            tidy(scene)
            scene.now += DAY
        return exists(scene, start)

    assert days(30)
    scene.change(follower, RunState.STARTING)
    assert days(3)
    scene.change(follower, ended)
    if ended is not RunState.SUCCEEDED:  # it can be resumed
        assert days(1)
        assert scene.run(start).expires_at is None
        days(1)
        assert not exists(scene, follower)
    assert not days(3)


def test_a_run_that_is_resumed_is_no_longer_announced(scene):
    limit(scene, days=1)
    run_id = scene.submit()
    scene.change(run_id, RunState.CANCELLED)
    tidy(scene)
    assert scene.run(run_id).expires_at is not None
    scene.change(run_id, RunState.QUEUED)
    assert scene.run(run_id).expires_at is None


def test_without_a_rule_nothing_leaves(scene):
    run_id = finished(scene)
    scene.now += 1000 * DAY
    tidy(scene)
    tidy(scene)
    assert exists(scene, run_id)


def test_removal_follows_no_link_and_leaves_no_root(scene, tmp_path):
    limit(scene, days=1)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "kept.txt").write_text("mine")
    inside, itself, elsewhere = finished(scene), finished(scene, files=False), finished(scene, files=False)
    (scene.place(inside).directory / "link").symlink_to(precious)
    scene.place(itself).home.symlink_to(precious)
    with scene.database.write() as session:
        runs.amend(
            session,
            runs.lock(session, elsewhere),
            now=scene.now,
            directory=str(tmp_path / "other" / elsewhere / "demo"),
        )
    (tmp_path / "other" / elsewhere / "demo").mkdir(parents=True)
    for _ in range(2):
        tidy(scene)
        scene.now += 3 * DAY
    assert not exists(scene, inside)
    assert (precious / "kept.txt").read_text() == "mine"
    assert exists(scene, itself), "what cannot be removed is still known"
    assert (tmp_path / "other" / elsewhere).exists()


def test_what_was_set_aside_before_a_crash_is_removed_by_the_next_round(scene):
    run_id = finished(scene)
    aside = run_homes.set_aside(scene.place(run_id).home, run_id, scene.settings.roots.homes, None)
    tidy(scene)
    assert aside.exists(), "its run is still known"
    with scene.database.write() as session:
        runs.delete(session, runs.lock(session, run_id))
    assert aside.parent == scene.settings.output_roots[0]
    tidy(scene)
    assert not aside.exists()


@pytest.mark.parametrize(
    ("content", "output"),
    [
        (None, None),
        ("", None),
        ("{}", None),
        ('{"output": null}', None),
        ("[]", None),
        ("{", None),
        ('{"output": "s3://bucket/runs"}', "s3://bucket/runs"),
    ],
)
def test_a_home_names_an_output_only_if_its_request_sets_one(tmp_path, content, output):
    if content is not None:
        (tmp_path / "request.json").write_text(content)
    assert run_homes._asked_output(tmp_path) == output


def test_directories_are_measured_and_counted_per_owner(scene):
    run_id = finished(scene)
    finished(scene, owner="bob", files=False)
    (scene.place(run_id).directory / "link").symlink_to("/")
    tidy(scene)
    with scene.database.read() as session:
        sizes = sharers.owner_bytes(session)
        assert sharers.unmeasured(session) == []
    assert (sizes["ann"], sizes["bob"]) == (1000, 0)


RUNS = st.lists(
    st.builds(FinishedRun, st.uuids().map(str), st.floats(0, 1e6), st.booleans()),
    max_size=12,
    unique_by=lambda run: run.run_id,
)
RULES = st.builds(Retention, days=st.none() | st.floats(0.5, 10), finished_runs=st.none() | st.integers(1, 5))


@given(RUNS, RULES)
def test_the_newest_stay_and_kept_runs_are_never_due(finished, rules):
    due = due_runs(finished, rules)
    assert not {run.run_id for run in finished if run.kept} & due.keys()
    assert all(each.time >= run.ended for run in finished if (each := due.get(run.run_id)))
    if rules.days is None:
        left = [run for run in finished if not run.kept and run.run_id not in due]
        others = [run for run in finished if run.run_id in due]
        assert len(left) == min(rules.finished_runs or 99, sum(not run.kept for run in finished))
        assert all(stays.ended >= goes.ended for stays in left for goes in others)


@given(st.lists(st.tuples(st.floats(0, 1e6) | st.none(), st.floats(0, 1e5)), max_size=20))
def test_nothing_is_removed_without_a_day_of_notice(steps):
    now, before, first = 0.0, None, None
    for due, passed in steps:
        now += passed
        after = announced(due, before, now)
        first = now if before is None and after is not None else first
        if after is None:
            first = None
        elif after <= now:
            assert due is not None
            assert due <= now
            assert now - first >= NOTICE_SECONDS - 1
        before = after


def test_runs_that_a_configuration_names_are_found_wherever_they_stand():
    ids = ["01JABCDEFGHJKMNPQRSTVWXYZ0", "01JABCDEFGHJKMNPQRSTVWXYZ1", "01JABCDEFGHJKMNPQRSTVWXYZ2"]
    config = {
        "output": f"/runs/{ids[2]}",
        "model": {"init": {"checkpoint": f"run://{ids[0]}/model"}},
        "corpus": {"sources": [{"path": f"/runs/{ids[1]}/demo/corpus/*.jsonl"}, {"path": f"/x/{ids[2]}1/y"}]},
    }
    assert named_runs(config) == set(ids[:2])
