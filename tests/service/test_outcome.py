from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.jobs import JobPhase, JobState, submission_id, submitted_run
from service.domain.outcome import (
    FUTILE_LIMIT,
    LINGER_SECONDS,
    FinalEvent,
    ObservedState,
    Outcome,
    decide_outcome,
    final_event,
)
from service.domain.states import ACTIVE, RunState, may_follow

NOW = 1000.0
FINISHED = FinalEvent("run_finished", "", NOW)
FAILED = FinalEvent("run_failed", "loss is not finite", NOW)
STOPPED = FinalEvent("run_stopped", "cancelled", NOW)

PENDING, RUNNING, SUCCEEDED, KILLED = (
    JobState(phase) for phase in (JobPhase.PENDING, JobPhase.RUNNING, JobPhase.SUCCEEDED, JobPhase.STOPPED)
)
DIED = JobState(JobPhase.FAILED, "Job supervisor actor died: the node was lost")
REFUSED = JobState(JobPhase.FAILED, "failed with exit code 2, last logs:\n\nconfig.name: 'x': no\n", 2)
ENDED = JobState(JobPhase.FAILED, "failed with exit code 1", 1)

ST, RU, SP = RunState.STARTING, RunState.RUNNING, RunState.STOPPING

TABLE = [
    # state, began, word, job -> state
    (ST, False, None, PENDING, None),
    (ST, False, None, RUNNING, None),
    (ST, True, None, RUNNING, RU),
    (ST, True, FINISHED, RUNNING, RU),
    (ST, False, None, None, "submit"),
    (ST, True, None, None, RunState.QUEUED),
    (ST, False, None, DIED, RunState.QUEUED),
    (ST, False, None, KILLED, RunState.QUEUED),
    (ST, False, None, REFUSED, RunState.FAILED),
    (ST, False, None, SUCCEEDED, RunState.SUCCEEDED),
    (ST, True, FINISHED, SUCCEEDED, RunState.SUCCEEDED),
    (ST, True, FAILED, ENDED, RunState.FAILED),
    (RU, True, None, RUNNING, None),
    (RU, True, FINISHED, RUNNING, None),
    (RU, True, FINISHED, SUCCEEDED, RunState.SUCCEEDED),
    (RU, True, FINISHED, DIED, RunState.SUCCEEDED),
    (RU, True, FINISHED, None, RunState.SUCCEEDED),
    (RU, True, FAILED, ENDED, RunState.FAILED),
    (RU, True, FAILED, None, RunState.FAILED),
    (RU, True, STOPPED, ENDED, RunState.CANCELLED),
    (RU, True, None, DIED, RunState.QUEUED),
    (RU, True, None, ENDED, RunState.QUEUED),
    (RU, True, None, KILLED, RunState.QUEUED),
    (RU, True, None, None, RunState.QUEUED),
    (RU, True, None, REFUSED, RunState.FAILED),
    (RU, True, None, SUCCEEDED, RunState.SUCCEEDED),
    (SP, True, None, RUNNING, None),
    (SP, False, None, PENDING, None),
    (SP, True, STOPPED, ENDED, RunState.CANCELLED),
    (SP, True, STOPPED, None, RunState.CANCELLED),
    (SP, True, FINISHED, SUCCEEDED, RunState.SUCCEEDED),
    (SP, True, FAILED, ENDED, RunState.FAILED),
    (SP, True, None, DIED, RunState.CANCELLED),
    (SP, True, None, KILLED, RunState.CANCELLED),
    (SP, True, None, None, RunState.CANCELLED),
    (SP, False, None, None, RunState.CANCELLED),
    (SP, False, None, REFUSED, RunState.CANCELLED),
]


@pytest.mark.parametrize(("state", "began", "word", "job", "expected"), TABLE)
def test_state_job_and_final_event_decide(state, began, word, job, expected):
    outcome = decide_outcome(
        ObservedState(state, stop="cancelled" if state is SP else None, began=began, final=word), job, NOW
    )
    assert (outcome.state or ("submit" if outcome.submit else None)) == expected


@pytest.mark.parametrize(
    ("stop", "reason"),
    [("cancelled", "cancelled"), ("killed", "cancelled; its driver was killed"), ("budget", "its budget is spent")],
)
def test_a_stopped_run_says_who_stopped_it(stop, reason):
    for word, job in ((STOPPED, ENDED), (None, KILLED), (None, None)):
        assert decide_outcome(ObservedState(SP, stop=stop, began=True, final=word), job, NOW) == Outcome(
            RunState.CANCELLED, reason
        )


def test_a_driver_that_stopped_on_its_own_gives_the_reason():
    word = FinalEvent("run_stopped", "superseded", NOW)
    assert decide_outcome(ObservedState(RU, began=True, final=word), ENDED, NOW).reason == "superseded"


def test_a_failure_has_the_drivers_message_and_a_refusal_the_last_line_of_its_log():
    assert decide_outcome(ObservedState(RU, began=True, final=FAILED), ENDED, NOW).reason == "loss is not finite"
    assert decide_outcome(ObservedState(ST), REFUSED, NOW).reason == "config.name: 'x': no"


def test_the_reason_for_a_lost_driver_is_a_line_of_text_and_not_an_event():
    event = '{"type": "progress", "data": {}}\n'
    killed = JobState(JobPhase.FAILED, f"failed with exit code -9, last logs:\n{event}", -9)
    broken = JobState(JobPhase.FAILED, f"failed with exit code 1, last logs:\nit broke\n{event}", 1)
    for job, words in ((killed, "its process was ended by signal 9"), (broken, "it broke")):
        assert decide_outcome(ObservedState(RU, began=True, advanced=True), job, NOW).reason.endswith(f": {words}")


def test_a_kill_is_repeated_until_the_driver_is_gone():
    observed = ObservedState(SP, stop="killed", began=True)
    assert decide_outcome(observed, RUNNING, NOW).kill
    assert decide_outcome(observed, PENDING, NOW).kill
    assert not decide_outcome(observed, KILLED, NOW).kill
    assert not decide_outcome(ObservedState(SP, stop="cancelled", began=True), RUNNING, NOW).kill


def test_a_process_that_lingers_after_its_final_event_is_not_waited_for():
    observed = ObservedState(RU, began=True, final=FINISHED)
    assert decide_outcome(observed, RUNNING, NOW + LINGER_SECONDS).state is None
    assert decide_outcome(observed, RUNNING, NOW + LINGER_SECONDS + 1).state is RunState.SUCCEEDED


def test_drivers_lost_without_getting_further_are_counted():
    futile = 0
    for _ in range(FUTILE_LIMIT - 1):
        outcome = decide_outcome(ObservedState(RU, futile=futile, began=True), DIED, NOW)
        assert outcome.state is RunState.QUEUED
        assert "the node was lost" in outcome.reason
        futile = outcome.futile
    outcome = decide_outcome(ObservedState(RU, futile=futile, began=True), DIED, NOW)
    assert outcome.state is RunState.FAILED
    assert "lost 3 drivers in a row" in outcome.reason


def test_progress_begins_the_count_anew():
    assert decide_outcome(ObservedState(RU, futile=2, advanced=True, began=True), DIED, NOW) == Outcome(
        RunState.QUEUED, f"its driver was lost and will be started again: {DIED.message}", 0
    )


def test_the_final_event_is_read_from_the_progress():
    assert final_event({}) == (True, None)
    assert final_event({"ended": {"type": "awaited"}}) == (False, None)
    failed, stopped = (
        {"type": "run_failed", "message": "no", "time": 3},
        {"type": "run_stopped", "reason": "budget", "time": 3},
    )
    assert final_event({"ended": failed}) == (True, FinalEvent("run_failed", "no", 3.0))
    assert final_event({"ended": stopped}) == (True, FinalEvent("run_stopped", "budget", 3.0))


WORDS = st.none() | st.builds(
    FinalEvent,
    st.sampled_from(["run_finished", "run_failed", "run_stopped", "run_confused"]),
    st.text(),
    st.floats(0, 2 * NOW),
)
OBSERVED = st.builds(
    ObservedState,
    st.sampled_from(RunState),
    st.sampled_from([None, "cancelled", "killed", "budget"]),
    st.integers(0, 5),
    st.booleans(),
    st.booleans(),
    WORDS,
)
JOBS = st.none() | st.builds(
    JobState, st.sampled_from(JobPhase), st.none() | st.text(), st.none() | st.integers(-15, 255)
)


@given(OBSERVED, JOBS, st.floats(0, 1e10))
def test_no_outcome_is_an_illegal_transition(observed, job, now):
    outcome = decide_outcome(observed, job, now)
    assert outcome.state is None or may_follow(observed.state, outcome.state)
    assert observed.state in ACTIVE or outcome == Outcome(futile=observed.futile)


@given(OBSERVED, JOBS)
def test_an_active_run_without_a_living_driver_is_never_left_alone(observed, job):
    outcome = decide_outcome(observed, job, NOW)
    gone = job is None or job.phase.ended
    if observed.state in ACTIVE and gone:
        assert outcome.state is not None or outcome.submit
    assert not (outcome.submit and job is not None), "a driver is submitted only where Ray knows none"


@given(st.sampled_from(sorted(ACTIVE)), JOBS, st.integers(0, 5))
def test_lost_drivers_end_after_the_limit(state, job, futile):
    outcome = decide_outcome(ObservedState(state, futile=futile, began=True), job, NOW)
    assert outcome.state is not RunState.QUEUED or outcome.futile < FUTILE_LIMIT


@given(st.text("0123456789ABCDEFGHJKMNPQRSTVWXYZ", min_size=26, max_size=26), st.integers(0, 10**8))
def test_a_submission_id_names_its_run(run_id, attempt):
    assert submitted_run(submission_id(run_id, attempt)) == (run_id, attempt)


@pytest.mark.parametrize(
    "name", ["raysubmit_4LamXRuQpYdSMg7J", "", "-", "a-", "a-x", "a-1e5", "a-٣", "a-99999999999999999999"]
)
def test_other_submission_ids_are_ignored(name):
    assert submitted_run(name) is None
