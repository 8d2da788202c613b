"""Decides the next state of an active run from its state, its Ray Job, and its driver's final event."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from service.domain.jobs import JobPhase, JobState
from service.domain.states import ACTIVE, RunState

FUTILE_LIMIT = 3
"""Number of consecutive drivers lost without progress at which a run fails."""
LINGER_SECONDS = 60.0
"""Maximum time for a driver's process to exit after its final event, in seconds."""
USER_ERROR = 2
"""Exit code of a driver that refuses its configuration: starting it again would not help."""
UNREADABLE_STOP_SECONDS = 120.0
"""Time for the driver of a run that this version cannot read to stop with a checkpoint, in seconds; then it is
killed."""
REASON_LENGTH = 500
"""Maximum length of a stored reason (characters)."""

Stop = Literal["cancelled", "killed", "budget", "month", "policy", "unreadable"]
"""Why a run was asked to stop; `killed` does not wait for a checkpoint. With `policy`, it is unknown what its owner may
spend. An `unreadable` run cannot be metered."""

STOP_REASONS: Mapping[str, str] = {
    "cancelled": "cancelled",
    "killed": "cancelled; its driver was killed",
    "budget": "its budget is spent",
    "unreadable": "its record cannot be read",
    "month": "its owner's dollars for this month are used up; it can be resumed next month",
    "policy": "its owner's policy cannot be read; it can be resumed once an administrator has set that policy again",
}

AWAITED = "awaited"
"""Placeholder for a driver's final event, stored while a new attempt's driver has not reported its start yet; it holds
the number of that driver's first line, `begin`, once it is known."""


@dataclasses.dataclass(frozen=True)
class FinalEvent:
    """The last event of a driver.

    Attributes:
        type: `run_finished`, `run_failed` or `run_stopped`.
        text: Message of a failure, reason of a stop, or a sentence that the finished model is worse than the start.
        time: Seconds since the epoch.
    """

    type: str
    text: str
    time: float


@dataclasses.dataclass(frozen=True)
class ObservedState:
    """The stored facts about a run from which its outcome is decided.

    Attributes:
        state: Stored state.
        stop: Why the run was asked to stop, if it was.
        reason: Stored reason for the state.
        overdue: Whether the driver has had its time to stop, and is killed.
        futile: Consecutive drivers lost without progress.
        advanced: Whether the current driver made more progress than the previous one.
        began: Whether the current driver has reported an event.
        final: Final event of the current driver.
    """

    state: RunState
    stop: str | None = None
    reason: str | None = None
    overdue: bool = False
    futile: int = 0
    advanced: bool = False
    began: bool = False
    final: FinalEvent | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Decision on an active run.

    Attributes:
        state: The next state; None keeps the current one.
        reason: Why the run enters that state.
        futile: Consecutive drivers lost without progress, including this one.
        submit: Whether to submit the job of this attempt; submitting it again is harmless.
        kill: Whether to kill the job's driver. Drivers of runs that are no longer active are killed in any case.
    """

    state: RunState | None = None
    reason: str | None = None
    futile: int = 0
    submit: bool = False
    kill: bool = False


def final_event(progress: Mapping[str, Any]) -> tuple[bool, FinalEvent | None]:
    """Whether the current driver has reported, and its final event, from a run's progress."""
    ended = progress.get("ended")
    if not ended:
        return True, None
    if ended.get("type") == AWAITED:
        return False, None
    text = ended.get("message") or ended.get("reason") or ended.get("worse_than_start") or ""
    return True, FinalEvent(str(ended.get("type")), str(text), float(ended.get("time") or 0.0))


def decide_outcome(observed: ObservedState, job: JobState | None, now: float) -> Outcome:
    """Decide the next state of an active run.

    Args:
        observed: The run. If its job has ended, every event that the driver wrote must have been stored.
        job: Ray's view of the current attempt's job; None if Ray does not know the job.
        now: Seconds since the epoch.
    """
    if observed.state not in ACTIVE:
        return Outcome(futile=observed.futile)
    alive = job is not None and not job.phase.ended
    if observed.final is not None and (not alive or now - observed.final.time > LINGER_SECONDS):
        return _by_final_event(observed, observed.final)
    return _under_way(observed) if alive else _without_final_event(observed, job)


def _under_way(observed: ObservedState) -> Outcome:
    if observed.state is RunState.STARTING and observed.began:
        return Outcome(RunState.RUNNING, None, observed.futile)
    return Outcome(futile=observed.futile, kill=observed.stop == "killed" or observed.overdue)


def _without_final_event(observed: ObservedState, job: JobState | None) -> Outcome:
    if job is not None and job.phase is JobPhase.SUCCEEDED:
        return Outcome(RunState.SUCCEEDED)
    if observed.state is RunState.STOPPING:
        return Outcome(RunState.CANCELLED, _stop_reason(observed))
    if job is None and not observed.began:
        return Outcome(futile=observed.futile, submit=True)
    if job is not None and job.exit_code == USER_ERROR:
        return Outcome(RunState.FAILED, _failure(job))
    return _lost(observed, job)


def _by_final_event(observed: ObservedState, final: FinalEvent) -> Outcome:
    if final.type == "run_finished":
        return Outcome(RunState.SUCCEEDED, final.text[:REASON_LENGTH] or None)
    if final.type == "run_stopped":
        return Outcome(RunState.CANCELLED, _stop_reason(observed) if observed.stop else final.text or "stopped")
    return Outcome(RunState.FAILED, final.text[:REASON_LENGTH] or "failed")


def _stop_reason(observed: ObservedState) -> str:
    if observed.stop == "unreadable" and observed.reason:
        return observed.reason
    return STOP_REASONS.get(observed.stop or "cancelled", "cancelled")


def _lost(observed: ObservedState, job: JobState | None) -> Outcome:
    why = "Ray no longer knows its job" if job is None else _failure(job)
    futile = 0 if observed.advanced else observed.futile + 1
    if futile >= FUTILE_LIMIT:
        return Outcome(RunState.FAILED, f"lost {futile} drivers in a row without progress; the last one: {why}", futile)
    return Outcome(RunState.QUEUED, f"its driver was lost and will be started again: {why}", futile)


def _failure(job: JobState) -> str:
    """Why a job failed: the signal that killed it, or the last line of Ray's message that is not a JSON event."""
    if job.exit_code is not None and job.exit_code < 0:
        return f"its process was ended by signal {-job.exit_code}"
    lines = [line.strip() for line in (job.message or "").splitlines()]
    plain = [line for line in lines if line and not line.startswith("{")]
    return (plain[-1] if plain else f"its job is {job.phase}")[:REASON_LENGTH]
