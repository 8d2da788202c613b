"""A Ray Job as the service sees it, and how it is called."""

from __future__ import annotations

import dataclasses
from enum import StrEnum


class JobPhase(StrEnum):
    """Where a Ray Job stands; Ray's own words."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    """Killed on request."""
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def ended(self) -> bool:
        """Whether the job's driver is gone for good."""
        return self not in (JobPhase.PENDING, JobPhase.RUNNING)


@dataclasses.dataclass(frozen=True)
class JobState:
    """What Ray says of a job.

    Attributes:
        phase: Where it stands.
        message: Ray's words on it; of a failed job, with the end of its log.
        exit_code: The driver's, once it ended by itself.
    """

    phase: JobPhase
    message: str | None = None
    exit_code: int | None = None


def submission_id(run_id: str, attempt: int) -> str:
    """Names the job of a run's attempt, so that submitting twice starts one driver."""
    return f"{run_id}-{attempt}"


def job_name(run_name: str, attempt: int) -> str:
    """The name under which the Ray dashboard lists the job of a run's attempt."""
    return run_name if attempt == 1 else f"{run_name} (attempt {attempt})"


def submitted_run(name: str) -> tuple[str, int] | None:
    """The run and the attempt that a submission id names; None: it is none of ours."""
    run_id, dash, attempt = name.rpartition("-")
    if not dash or not (attempt.isascii() and attempt.isdigit() and len(attempt) < 10):
        return None
    return run_id, int(attempt)
