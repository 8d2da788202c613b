"""What follows from a run's state, what Ray says of its job, and its driver's last word."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from service.domain.jobs import JobPhase, JobState
from service.domain.states import ACTIVE, RunState

FUTILE_LIMIT = 3
"""Drivers lost in a row that got no further than the one before, after which a run has failed."""
LINGER_SECONDS = 60.0
"""For a driver's process to end after its last word."""
USER_ERROR = 2
"""Exit code of a driver that refuses its configuration: another one would as well."""
REASON_LENGTH = 500

Stop = Literal["cancelled", "killed", "budget", "month"]
"""Why a run was asked to end; `killed`: without waiting for a checkpoint."""

STOP_REASONS: Mapping[str, str] = {
    "cancelled": "cancelled",
    "killed": "cancelled; its driver was killed",
    "budget": "its budget is spent",
    "month": "its owner's dollars for this month are used up; it can be resumed next month",
}

AWAITED = "awaited"
"""Type of the last word of a driver that has not begun: no earlier driver's counts any more."""


@dataclasses.dataclass(frozen=True)
class Word:
    """A driver's last word.

    Attributes:
        type: `run_finished`, `run_failed`, `run_stopped`.
        text: The message of a failure, the reason of a stop.
        time: When, in seconds since the epoch.
    """

    type: str
    text: str
    time: float


@dataclasses.dataclass(frozen=True)
class Facts:
    """A run, as far as it matters here.

    Attributes:
        state: Where it stands.
        stop: Why it was asked to end, if it was.
        futile: Drivers lost in a row that got no further.
        advanced: Whether the present driver got further than the one before.
        began: Whether the present driver has been heard of.
        word: The present driver's last word.
    """

    state: RunState
    stop: str | None = None
    futile: int = 0
    advanced: bool = False
    began: bool = False
    word: Word | None = None


@dataclasses.dataclass(frozen=True)
class Settlement:
    """What is to be done.

    Attributes:
        state: The state that follows; None: it stays.
        reason: Of that state.
        futile: Drivers lost in a row, from now on.
        submit: Submit the job of this attempt; it may have been before.
        kill: End the job's driver; those of runs that are no longer active are ended in any case.
    """

    state: RunState | None = None
    reason: str | None = None
    futile: int = 0
    submit: bool = False
    kill: bool = False


def last_word(progress: Mapping[str, Any]) -> tuple[bool, Word | None]:
    """Whether the present driver has been heard of, and its last word, from a run's progress."""
    ended = progress.get("ended")
    if not ended:
        return True, None
    if ended.get("type") == AWAITED:
        return False, None
    text = ended.get("message") or ended.get("reason") or ""
    return True, Word(str(ended.get("type")), str(text), float(ended.get("time") or 0.0))


def settle(facts: Facts, job: JobState | None, now: float) -> Settlement:
    """Decide what becomes of an active run.

    Args:
        facts: Of the run; every event that its driver left behind is taken in, if the job has ended.
        job: What Ray says of the present attempt's job; None: Ray does not know it.
        now: Seconds since the epoch.
    """
    if facts.state not in ACTIVE:
        return Settlement(futile=facts.futile)
    alive = job is not None and not job.phase.ended
    if facts.word is not None and (not alive or now - facts.word.time > LINGER_SECONDS):
        return _by_word(facts, facts.word)
    return _under_way(facts) if alive else _without_word(facts, job)


def _under_way(facts: Facts) -> Settlement:
    if facts.state is RunState.STARTING and facts.began:
        return Settlement(RunState.RUNNING, None, facts.futile)
    return Settlement(futile=facts.futile, kill=facts.stop == "killed")


def _without_word(facts: Facts, job: JobState | None) -> Settlement:
    if job is not None and job.phase is JobPhase.SUCCEEDED:
        return Settlement(RunState.SUCCEEDED)
    if facts.state is RunState.STOPPING:
        return Settlement(RunState.CANCELLED, _stopped(facts))
    if job is None and not facts.began:
        return Settlement(futile=facts.futile, submit=True)
    if job is not None and job.exit_code == USER_ERROR:
        return Settlement(RunState.FAILED, _words(job))
    return _lost(facts, job)


def _by_word(facts: Facts, word: Word) -> Settlement:
    if word.type == "run_finished":
        return Settlement(RunState.SUCCEEDED)
    if word.type == "run_stopped":
        return Settlement(RunState.CANCELLED, _stopped(facts) if facts.stop else word.text or "stopped")
    return Settlement(RunState.FAILED, word.text[:REASON_LENGTH] or "failed")


def _stopped(facts: Facts) -> str:
    return STOP_REASONS.get(facts.stop or "cancelled", "cancelled")


def _lost(facts: Facts, job: JobState | None) -> Settlement:
    why = "Ray knows its job no more" if job is None else _words(job)
    futile = 0 if facts.advanced else facts.futile + 1
    if futile >= FUTILE_LIMIT:
        return Settlement(RunState.FAILED, f"lost {futile} drivers in a row without getting further; the last one: {why}", futile)
    return Settlement(RunState.QUEUED, f"its driver was lost and will be started again: {why}", futile)


def _words(job: JobState) -> str:
    """The last line of what Ray says, which is the last of the driver's log where it failed; its events there are no words."""
    if job.exit_code is not None and job.exit_code < 0:
        return f"its process was ended by signal {-job.exit_code}"
    lines = [line.strip() for line in (job.message or "").splitlines()]
    spoken = [line for line in lines if line and not line.startswith("{")]
    return (spoken[-1] if spoken else f"its job is {job.phase}")[:REASON_LENGTH]
