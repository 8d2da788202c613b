from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from drawn import examples
from fake_jobs import FakeJobs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reconciling import FINISH, SECRET, Scene

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.driver_proofs import ReportAddress
from moedisco_ray.core.records.events import Event
from service.background import launching
from service.background.reconciler import RAY_AWAY
from service.database import ingest, policies, runs
from service.database.session import Database
from service.domain.jobs import submission_id
from service.domain.policies import Policy
from service.domain.signatures import driver_key
from service.domain.states import TERMINAL, RunState
from service.errors import RayUnavailable, StaleRun


@pytest.fixture
def scene(database: Database, tmp_path: Path) -> Scene:
    return Scene.on(database, tmp_path)


def test_a_queued_run_becomes_a_job_that_can_prove_itself(scene):
    run_id = scene.submit()
    scene.round()
    run, submission = scene.run(run_id), scene.jobs.submissions[f"{run_id}-1"]
    assert (run.state, run.attempt, run.reason) == ("starting", 1, None)
    address = ReportAddress.from_json(submission.report_to.read_text())
    assert address == ReportAddress(f"http://127.0.0.1:8300/v1/runs/{run_id}/report", 1, driver_key(SECRET, run_id, 1))
    assert stat.S_IMODE(submission.report_to.stat().st_mode) == 0o600
    written = RunConfig.model_validate(json.loads(submission.config_path.read_text()))
    assert written.directory == Path(run.directory)
    assert (
        submission.config_path.parent
        == submission.stop_file.parent
        == submission.report_to.parent
        == Path(run.directory).parent
    )


def test_the_ray_dashboard_lists_a_job_by_its_runs_name_and_attempt(scene):
    run_id = scene.running(name="tiny")
    scene.jobs.dies(scene.job(run_id))
    scene.round(12)
    names = [submission.metadata["job_name"] for submission in scene.jobs.submissions.values()]
    assert names[:2] == ["tiny", "tiny (attempt 2)"]


def test_a_run_goes_from_the_queue_to_its_end(scene):
    run_id = scene.running()
    scene.report(run_id, FINISH)
    scene.round()
    assert scene.run(run_id).state == "running", "its process has not ended"
    scene.jobs.ends(scene.job(run_id))
    scene.round(3)
    assert scene.states(run_id) == ["queued", "starting", "running", "succeeded"]


def test_rounds_without_news_change_nothing(scene):
    run_id = scene.running()
    version = scene.run(run_id).version
    scene.round(5)
    assert scene.run(run_id).version == version
    assert scene.jobs.asked == [f"{run_id}-1"]


def test_a_submission_whose_answer_was_lost_starts_one_driver(scene):
    run_id = scene.submit()
    scene.jobs.answers_lost = 1
    scene.round(3)
    assert scene.run(run_id).state == "starting"
    assert list(scene.jobs.submissions) == [f"{run_id}-1"]


def test_a_submission_that_never_arrived_is_repeated_with_the_same_key(scene):
    run_id = scene.submit()
    scene.round()
    first = scene.jobs.submissions[f"{run_id}-1"]
    key = first.report_to.read_text()
    scene.jobs.restart()
    scene.round()
    assert scene.jobs.asked == [f"{run_id}-1"] * 2
    assert scene.jobs.submissions[f"{run_id}-1"] == first
    assert first.report_to.read_text() == key


def test_while_ray_is_away_nothing_changes_but_the_reason(scene):
    running, queued = scene.running(), scene.submit()
    scene.jobs.away = scene.pools.away = True
    scene.round(3)
    assert (scene.run(running).state, scene.run(running).reason) == ("running", RAY_AWAY)
    assert (scene.run(queued).state, scene.run(queued).reason) == ("queued", RAY_AWAY)
    scene.jobs.away = scene.pools.away = False
    scene.round()
    assert (scene.run(running).state, scene.run(running).reason) == ("running", None)
    assert scene.run(queued).state == "starting"


def test_a_lost_driver_is_followed_by_another_with_another_key(scene):
    run_id = scene.running()
    old = scene.jobs.submissions[scene.job(run_id)].report_to
    scene.jobs.dies(scene.job(run_id))
    scene.round()
    run = scene.run(run_id)
    assert (run.state, run.attempt) == ("starting", 2)
    new = scene.jobs.submissions[scene.job(run_id)].report_to
    assert len({ReportAddress.from_json(file.read_text()).key for file in (old, new)}) == 2
    assert scene.states(run_id)[-2:] == ["queued", "starting"]


def test_a_service_that_restarts_elsewhere_says_so_to_its_drivers(scene):
    run_id, ended = scene.running(), scene.running()
    scene.jobs.ends(scene.job(ended), exit_code=1)
    file, untouched = scene.place(run_id).report_to(1), scene.place(ended).report_to(1)
    before, left = file.read_text(), untouched.read_text()
    scene.round()
    assert file.read_text() == before
    scene.settings = scene.settings.model_copy(update={"port": 8301})
    scene.jobs.away = True  # Ray may come back with the driver
    scene.round()
    address = ReportAddress.from_json(file.read_text())
    assert address == dataclasses.replace(
        ReportAddress.from_json(before), url=f"http://127.0.0.1:8301/v1/runs/{run_id}/report"
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert untouched.read_text() == left


def test_an_address_that_cannot_be_written_is_written_later(scene, monkeypatch):
    def full_disk(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    run_id = scene.running()
    scene.settings = scene.settings.model_copy(update={"port": 8301})
    with monkeypatch.context() as patch:
        patch.setattr(launching, "write_in", full_disk)
        scene.round(2)
    assert scene.run(run_id).state == "running"
    scene.round()
    assert ":8301/" in scene.place(run_id).report_to(1).read_text()


def test_a_head_that_comes_back_without_jobs_costs_a_driver_and_no_run(scene):
    run_id = scene.running()
    scene.jobs.restart()
    scene.round()
    assert scene.run(run_id).attempt == 2
    scene.begins(run_id)
    scene.round()
    assert scene.run(run_id).state == "running"


def test_three_drivers_that_got_no_further_are_enough(scene):
    run_id = scene.submit()
    for _ in range(3):
        scene.round()
        scene.begins(run_id)
        scene.jobs.dies(scene.job(run_id))
    scene.round()
    run = scene.run(run_id)
    assert run.state == "failed"
    assert "lost 3 drivers" in run.reason
    assert run.attempt == 3


def test_drivers_that_get_further_may_be_lost_for_ever(scene):
    run_id = scene.running()
    scene.report(run_id, Event("unit_started", "seed", "seed", {"steps": 100, "tokens": 100, "workers": 1}))
    for step in range(1, 8):
        scene.report(
            run_id, Event("progress", "seed", "seed", {"step": step, "steps": 100, "tokens": step, "loss": 1.0})
        )
        scene.jobs.dies(scene.job(run_id))
        scene.round()
        scene.begins(run_id)
        scene.round()
    assert scene.run(run_id).state == "running"
    assert scene.run(run_id).attempt == 8


def test_what_a_dead_driver_left_in_its_log_decides(scene):
    run_id = scene.running()
    scene.leave(run_id, FINISH)
    scene.jobs.restart()
    scene.round()
    run = scene.run(run_id)
    assert (run.state, run.attempt, run.next_seq) == ("succeeded", 1, 2)


def test_lines_that_cannot_be_read_have_no_number_and_a_torn_one_is_not_there(scene):
    run_id = scene.running()
    log = scene.place(run_id).events
    with log.open("a") as file:
        file.write('{"type": "warn\nnull\n[1]\n\n')
        file.write(Event("warning", data={"message": "whole"}).to_json() + "\n")
        file.write(FINISH.to_json())
    scene.jobs.dies(scene.job(run_id))
    scene.round()
    run = scene.run(run_id)
    assert run.next_seq == 2
    assert run.attempt == 2, "the torn last word was not said"


def test_an_event_that_makes_no_sense_keeps_its_number(scene):
    run_id = scene.running()
    with scene.place(run_id).events.open("a") as file:
        file.write('{"type": "progress", "data": 7, "time": "noon"}\n')
    scene.leave(run_id, FINISH)
    scene.jobs.ends(scene.job(run_id))
    scene.round()
    assert (scene.run(run_id).state, scene.run(run_id).next_seq) == ("succeeded", 3)


def test_a_log_that_cannot_be_read_decides_nothing(scene, monkeypatch):
    run_id = scene.running()
    scene.jobs.dies(scene.job(run_id))

    def broken(path, *args, **kwargs):
        if path == "events.jsonl":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *args, **kwargs)

    opened = os.open
    monkeypatch.setattr(os, "open", broken)
    scene.round()
    assert scene.run(run_id).state == "running"
    assert "cannot be used" in scene.run(run_id).reason


def test_a_failure_has_the_drivers_message(scene):
    run_id = scene.running()
    scene.report(run_id, Event("run_failed", data={"message": "loss is not finite"}))
    scene.jobs.ends(scene.job(run_id), exit_code=1)
    scene.round()
    assert (scene.run(run_id).state, scene.run(run_id).reason) == ("failed", "loss is not finite")


def test_a_driver_that_refuses_its_configuration_is_not_started_again(scene):
    run_id = scene.submit()
    scene.round()
    scene.jobs.ends(scene.job(run_id), exit_code=2)
    scene.round()
    assert (scene.run(run_id).state, scene.run(run_id).reason) == ("failed", "it broke")


def test_a_spent_budget_stops_a_run_with_a_checkpoint(scene):
    run_id = scene.running(budget=1.0)
    with scene.database.write() as session:
        runs.amend(session, runs.lock(session, run_id), now=scene.now, dollars=1.5)
    scene.round()
    run = scene.run(run_id)
    assert (run.state, run.stop) == ("stopping", "budget")
    assert scene.place(run_id).stop_file(1).read_text() == "budget"
    scene.report(run_id, Event("run_stopped", data={"reason": "budget"}))
    scene.jobs.ends(scene.job(run_id), exit_code=3)
    scene.round()
    assert (scene.run(run_id).state, scene.run(run_id).reason) == ("cancelled", "its budget is spent")


def test_a_run_without_budget_left_waits_for_more(scene):
    run_id = scene.submit(budget=1.0)
    with scene.database.write() as session:
        runs.amend(session, runs.lock(session, run_id), now=scene.now, dollars=1.0)
    scene.round()
    assert scene.run(run_id).reason == "its budget of $1.00 is spent"
    with scene.database.write() as session:
        runs.amend(session, runs.lock(session, run_id), now=scene.now, budget_dollars=2.0)
    scene.round()
    assert scene.run(run_id).state == "starting"


def test_a_cancelled_run_ends_after_its_checkpoint(scene):
    run_id = scene.running()
    scene.change(run_id, RunState.STOPPING, stop="cancelled")
    scene.round(2)
    assert scene.place(run_id).stop_file(1).read_text() == "cancelled"
    assert scene.jobs.killed == []
    scene.report(run_id, Event("run_stopped", data={"reason": "cancelled"}))
    scene.jobs.ends(scene.job(run_id), exit_code=3)
    scene.round()
    assert scene.states(run_id)[-2:] == ["stopping", "cancelled"]


def test_a_run_that_ended_worse_than_its_start_has_that_as_its_reason(scene):
    """The REST API, the list, the page's heading and the message about its end show a run's reason next to its state.

    Before (af276e38): the run was `succeeded`, with the reason None.
    """
    worse = "WORSE THAN ITS START: perplexity 94.50, the start had 67.30 on the same text"
    run_id = scene.running()
    scene.report(run_id, Event("run_finished", data={"seconds": 1.0, "worse_than_start": worse}))
    scene.jobs.ends(scene.job(run_id), 0)
    scene.round()
    assert (scene.run(run_id).state, scene.run(run_id).reason) == ("succeeded", worse)


def test_a_run_that_finishes_while_it_is_cancelled_has_succeeded(scene):
    run_id = scene.running()
    scene.change(run_id, RunState.STOPPING, stop="cancelled")
    scene.report(run_id, FINISH)
    scene.jobs.ends(scene.job(run_id))
    scene.round()
    assert scene.run(run_id).state == "succeeded"


def test_a_kill_reaches_the_job_though_ray_was_away(scene):
    run_id = scene.running()
    scene.change(run_id, RunState.STOPPING, stop="killed")
    scene.jobs.away = True
    scene.round()
    scene.jobs.away = False
    scene.round(2)
    assert scene.jobs.killed == [f"{run_id}-1"]
    assert scene.run(run_id).state == "cancelled"


@pytest.mark.parametrize("stop", ["cancelled", "killed"])
def test_a_run_whose_stop_file_cannot_be_written_ends_with_its_driver(scene, stop):
    run_id = scene.running()
    home = scene.place(run_id).home
    home.rename(home.with_name("aside"))
    home.write_text("in the way")
    scene.change(run_id, RunState.STOPPING, stop=stop)
    scene.round()
    assert scene.run(run_id).reason == "its directory cannot be used: Not a directory"
    assert scene.jobs.killed == ([scene.job(run_id)] if stop == "killed" else [])
    scene.jobs.ends(scene.job(run_id), exit_code=3)
    scene.round()
    assert scene.run(run_id).state == "cancelled"


def test_the_stop_file_of_one_attempt_does_not_stop_the_next(scene):
    run_id = scene.running()
    scene.change(run_id, RunState.STOPPING, stop="cancelled")
    scene.round()
    scene.report(run_id, Event("run_stopped", data={"reason": "cancelled"}))
    scene.jobs.ends(scene.job(run_id), exit_code=3)
    scene.round()
    scene.change(run_id, RunState.QUEUED)
    scene.round()
    run = scene.run(run_id)
    assert (run.state, run.attempt, run.stop) == ("starting", 2, None)
    assert not scene.place(run_id).stop_file(2).exists()
    scene.round(2)
    assert scene.run(run_id).state == "starting", "the last word of the driver before counts no more"


def test_the_driver_of_an_attempt_that_was_given_up_is_ended(scene):
    run_id = scene.running()
    scene.jobs.dies(f"{run_id}-1")
    scene.round()
    scene.jobs.runs(f"{run_id}-1")
    scene.jobs.runs("another-services-job")
    scene.jobs.runs("01ARZ3NDEKTSV4RRFFQ69G5FAV-1")
    scene.round()
    assert scene.jobs.killed == [f"{run_id}-1"]


def test_a_left_driver_that_cannot_be_ended_holds_up_no_run(scene, monkeypatch):
    """Before (af276e38): the round ends with ValueError, and the queued run does not start."""
    given_up, other = scene.running(), scene.running()
    for run_id in (given_up, other):
        scene.jobs.dies(f"{run_id}-1")
    scene.round()
    for run_id in (given_up, other):
        scene.jobs.runs(f"{run_id}-1")
    unable_to_kill(scene.jobs, f"{given_up}-1", monkeypatch)
    queued = scene.submit(owner="bob")
    scene.round()
    assert scene.jobs.killed == [f"{other}-1"]
    assert scene.run(queued).state == "starting"


def test_a_run_that_cannot_be_processed_keeps_its_mark_until_it_can(scene, monkeypatch):
    """Before (af276e38): the first round ends with ValueError, and the queued run does not start."""
    run_id, marks = scene.running(), []
    scene.change(run_id, RunState.STOPPING, stop="killed")
    unable_to_kill(scene.jobs, scene.job(run_id), monkeypatch)
    queued = scene.submit(owner="bob")
    store = runs.mark_trouble
    monkeypatch.setattr(runs, "mark_trouble", lambda *args, **named: (marks.append(args[2]), store(*args, **named)))
    scene.round(5)
    first, last = marks[0], scene.run(run_id).trouble
    scene.round(5)
    assert "ValueError" in first
    assert (scene.run(run_id).trouble, len(marks)) == (last, 2), (
        "one for each of the two steps that fail, in the first round"
    )
    assert scene.run(queued).state == "starting"
    monkeypatch.undo()
    scene.round(2)
    assert (scene.run(run_id).state, scene.run(run_id).trouble) == ("cancelled", None)


def unable_to_kill(jobs: FakeJobs, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray answer the end of one driver with something that no handler expects."""
    kill = jobs.kill

    def unforeseen(submission_id: str) -> None:
        if submission_id == name:
            raise ValueError("an answer that is not JSON")
        kill(submission_id)

    monkeypatch.setattr(jobs, "kill", unforeseen)


def test_a_driver_that_hangs_after_its_final_event_is_ended(scene):
    run_id = scene.running()
    scene.report(run_id, FINISH)
    scene.round(4)
    assert scene.run(run_id).state == "running"
    scene.round(4)
    assert scene.run(run_id).state == "succeeded"
    assert scene.jobs.killed == [f"{run_id}-1"]


def test_priorities_and_limits_order_the_queue(database, tmp_path):
    scene = Scene.on(database, tmp_path, max_active_runs=2)
    with database.write() as session:
        policies.put(session, "ann", Policy(active_runs=1), scene.now)
    late, urgent, other = scene.submit(), scene.submit(priority=5), scene.submit(owner="bob")
    last = scene.submit(owner="eve")
    scene.round()
    assert [scene.run(each).state for each in (late, urgent, other, last)] == [
        "queued",
        "starting",
        "starting",
        "queued",
    ]
    assert scene.run(last).reason == "2 of 2 runs are active"


def test_runs_wait_for_slots_and_say_so(scene):
    scene.pools.slots["low_mem_gpu"] = 1
    first, second = scene.submit(), scene.submit(owner="bob")
    scene.round(2)
    assert scene.run(first).state == "starting"
    assert scene.run(second).reason == "waits for 1 low_mem_gpu: 0 of 1 are free"
    scene.pools.slots["low_mem_gpu"] = 2
    scene.round()
    assert scene.run(second).state == "starting"


def test_a_pool_without_machines_is_waited_for_unless_an_autoscaler_brings_them(scene):
    scene.pools.slots = {"high_mem_gpu": 1}
    run_id = scene.submit()
    scene.round()
    assert scene.run(run_id).reason == "no node offers low_mem_gpu"
    scene.pools.autoscaled = True
    scene.round()
    assert scene.run(run_id).state == "starting"


def test_a_run_whose_fine_tune_is_on_the_cheap_pool_needs_no_other(scene):
    scene.pools.slots = {"low_mem_gpu": 1}
    run_id = scene.submit(finetune={"pool": "low_memory"}, pools={"low_memory": {"max_workers": 2}})
    scene.round()
    assert scene.run(run_id).reason == "needs 2 low_mem_gpu at once; the nodes offer 1"
    scene.pools.slots = {"low_mem_gpu": 2}
    scene.round()
    assert scene.run(run_id).state == "starting"


def test_a_directory_that_cannot_be_created_is_reported_and_tried_again(scene):
    run_id = scene.submit()
    (scene.root / "runs").write_text("in the way")
    scene.round(2)
    assert scene.run(run_id).state == "starting"
    assert "cannot be used" in scene.run(run_id).reason
    (scene.root / "runs").unlink()
    scene.round()
    assert list(scene.jobs.submissions) == [f"{run_id}-1"]


def test_a_request_that_comes_in_between_wins(scene, monkeypatch):
    run_id, other = scene.running(), scene.running(owner="bob")

    def refuse(*args: Any, **kwargs: Any) -> None:
        if args[1].id == run_id:
            raise StaleRun("changed meanwhile")
        transition(*args, **kwargs)

    transition = runs.transition
    monkeypatch.setattr(runs, "transition", refuse)
    for each in (run_id, other):
        scene.report(each, FINISH)
        scene.jobs.ends(scene.job(each))
    scene.round()
    assert (scene.run(run_id).state, scene.run(other).state) == ("running", "succeeded")
    monkeypatch.undo()
    scene.round()
    assert scene.run(run_id).state == "succeeded"


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("step", ["transition", "write", "submit before", "submit after", "kill", "take", "stop file"])
def test_a_round_that_is_cut_short_anywhere_is_finished_by_the_next(scene, step, monkeypatch):
    """Every step of a run's life is crashed once; the run still has one driver per attempt and ends as it should."""
    crashed: list[str] = []

    def crashing(*args: Any, **kwargs: Any) -> Any:
        if crashed:
            return original(*args, **kwargs)
        crashed.append(step)
        if after:
            original(*args, **kwargs)
        raise Crash

    owner, name, after = {
        "transition": (runs, "transition", False),
        "write": (launching, "write_in", False),
        "submit before": (scene.jobs, "submit", False),
        "submit after": (scene.jobs, "submit", True),
        "kill": (scene.jobs, "kill", False),
        "take": (ingest, "take", False),
        "stop file": (launching.Launcher, "request_stop", False),
    }[step]

    def round_() -> None:
        with contextlib.suppress(Crash):
            scene.round()

    run_id = scene.submit()
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, crashing)
    for _ in range(3):
        round_()
    assert list(scene.jobs.submissions) == [f"{run_id}-1"]
    with contextlib.suppress(Crash):
        scene.begins(run_id)
    scene.begins(run_id)
    round_()
    scene.change(run_id, RunState.STOPPING, stop="killed")
    for _ in range(2):
        round_()
    scene.leave(run_id, Event("run_stopped", data={"reason": "killed"}))
    for _ in range(3):
        round_()
    assert crashed
    assert scene.states(run_id) == ["queued", "starting", "running", "stopping", "cancelled"]


WORDS = {
    "finish": FINISH,
    "fail": Event("run_failed", data={"message": "no"}),
    "stop": Event("run_stopped", data={"reason": "x"}),
    "progress": Event("progress", "seed", "seed", {"step": 1, "steps": 99, "tokens": 1, "loss": 1.0}),
}
TO_A_DRIVER = ("begin", "die", "end", *WORDS)
TO_RAY = ("restart", "away", "back", "lose answer")
TO_THE_RUN = ("cancel", "kill", "resume")
HAPPENINGS = st.lists(st.sampled_from(["round"] * 3 + [*TO_A_DRIVER, *TO_RAY, *TO_THE_RUN]), max_size=40)


@settings(max_examples=examples(15, 60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(happenings=HAPPENINGS)
def test_whatever_happens_a_run_comes_to_an_end(scene, happenings):
    """No event makes a round fail; no attempt has two drivers; a run ends once Ray answers and its drivers ended."""
    with scene.database.write() as session:
        for left_over in runs.in_states(session, list(RunState)):
            runs.delete(session, left_over)
    scene = Scene.on(scene.database, scene.root)
    run_id = scene.submit()
    for happening in happenings:
        _let_happen(scene, run_id, happening)
        assert sum(not job.phase.ended for job in scene.jobs.jobs.values()) <= 1
    scene.jobs.away = scene.pools.away = False
    for _ in range(4):
        scene.round()
        for name, job in list(scene.jobs.jobs.items()):
            if not job.phase.ended:
                scene.jobs.ends(name, exit_code=0)
    scene.round()
    assert RunState(scene.run(run_id).state) in TERMINAL


def _let_happen(scene: Scene, run_id: str, happening: str) -> None:
    run = scene.run(run_id)
    job = submission_id(run_id, run.attempt)
    if happening == "round":
        scene.round()
    elif happening in TO_A_DRIVER and job in scene.jobs.jobs and not scene.jobs.jobs[job].phase.ended:
        _to_a_driver(scene, run_id, job, happening)
    elif happening in TO_RAY:
        _to_ray(scene, happening)
    elif happening == "resume" and run.state in ("failed", "cancelled"):
        scene.change(run_id, RunState.QUEUED)
    elif happening in ("cancel", "kill") and run.state in ("starting", "running"):
        scene.change(run_id, RunState.STOPPING, stop="killed" if happening == "kill" else "cancelled")


def _to_a_driver(scene: Scene, run_id: str, job: str, happening: str) -> None:
    if happening == "begin":
        scene.begins(run_id)
    elif happening == "die":
        scene.jobs.dies(job)
    elif happening == "end":
        scene.jobs.ends(job, exit_code=1)
    else:
        scene.leave(run_id, WORDS[happening])


def _to_ray(scene: Scene, happening: str) -> None:
    if happening == "restart":
        scene.jobs.restart()
    elif happening == "lose answer":
        scene.jobs.answers_lost = 1
    else:
        scene.jobs.away = scene.pools.away = happening == "away"


def test_an_outage_between_two_calls_is_an_outage(scene, monkeypatch):
    run_id = scene.running()
    scene.change(run_id, RunState.STOPPING, stop="killed")

    def away(name: str) -> None:
        raise RayUnavailable("gone")

    monkeypatch.setattr(scene.jobs, "kill", away)
    scene.round()
    assert scene.run(run_id).state == "stopping"
