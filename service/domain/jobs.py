"""States and names of the Ray Jobs that run drivers."""

from __future__ import annotations

import dataclasses
from enum import StrEnum


class JobPhase(StrEnum):
    """Status of a Ray Job, with Ray's names."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    """Killed on request."""
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def ended(self) -> bool:
        """Whether the job has ended, which means that its driver no longer runs."""
        return self not in (JobPhase.PENDING, JobPhase.RUNNING)


@dataclasses.dataclass(frozen=True)
class JobState:
    """What Ray reports about a job.

    Attributes:
        phase: Status of the job.
        message: Ray's message; for a failed job it ends with the last lines of the log.
        exit_code: Exit code of the driver, once it has exited.
    """

    phase: JobPhase
    message: str | None = None
    exit_code: int | None = None


def submission_id(run_id: str, attempt: int) -> str:
    """Id of the job of a run's attempt; submitting it twice starts one driver."""
    return f"{run_id}-{attempt}"


def job_name(run_name: str, attempt: int) -> str:
    """Name of the job of a run's attempt in the Ray dashboard."""
    return run_name if attempt == 1 else f"{run_name} (attempt {attempt})"


def submitted_run(name: str) -> tuple[str, int] | None:
    """The run and the attempt that a submission id names; None for jobs that the service did not submit."""
    run_id, dash, attempt = name.rpartition("-")
    if not dash or not (attempt.isascii() and attempt.isdigit() and len(attempt) < 10):
        return None
    return run_id, int(attempt)
