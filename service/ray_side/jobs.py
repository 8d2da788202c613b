"""Ray Jobs: one per attempt of a run, each the driver of a training run."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from moedisco_ray.core.read_roots import ENVIRONMENT as READ_ROOTS
from service.domain.jobs import JobState
from service.ray_side.answers import Job, read_as
from service.ray_side.dashboard import Dashboard, refused


@dataclasses.dataclass(frozen=True)
class Submission:
    """A driver to start.

    Attributes:
        id: Names the job; see `service.domain.jobs.submission_id`.
        run: The run's id.
        config_path: The run's configuration, as JSON.
        stop_file: The driver ends, with a checkpoint, once this exists.
        report_url: Where the driver posts its events.
        token: What it proves itself with there.
        read_roots: Directories that the driver and its workers may read for the configuration.
        metadata: Shown with the job in the Ray dashboard.
    """

    id: str
    run: str
    config_path: Path
    stop_file: Path
    report_url: str
    token: str = dataclasses.field(repr=False)
    read_roots: Sequence[Path] = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Jobs(Protocol):
    """The jobs of a Ray cluster. Every call may raise `RayUnavailable`."""

    def submit(self, submission: Submission) -> None:
        """Start a driver; a job of this id that exists already is left alone."""

    def statuses(self) -> dict[str, JobState]:
        """Every job that Ray knows, by submission id. A restarted head knows none."""

    def kill(self, submission_id: str) -> None:
        """End a job's driver at once; one that is unknown or has ended is left alone."""

    def delete(self, submission_id: str) -> None:
        """Forget an ended job; an unknown one is forgotten already."""


class RayJobs:
    """`Jobs` over a dashboard's Jobs REST.

    Args:
        dashboard: Of the cluster.
        python: What a driver is started with; the default is the head node's own.
    """

    def __init__(self, dashboard: Dashboard, python: str = "python") -> None:
        self._dashboard = dashboard
        self._python = python

    def submit(self, submission: Submission) -> None:
        """See `Jobs`. The token travels in the environment: command lines can be read by every user of the node."""
        answer = self._dashboard.send("POST", "/api/jobs/", body={
            "submission_id": submission.id,
            "entrypoint": entrypoint(submission, self._python),
            "runtime_env": {"env_vars": {
                "MOEDISCO_RUN_TOKEN": submission.token,
                READ_ROOTS: json.dumps([str(root) for root in submission.read_roots]),
                "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
            }},
            "metadata": dict(submission.metadata),
        })
        # Ray answers a repeated id with the same 500 as every other failure: what counts is whether it knows the job now.
        if not answer.is_success and submission.id not in self.statuses():
            raise refused(answer)

    def statuses(self) -> dict[str, JobState]:
        """See `Jobs`."""
        jobs = read_as(list[Job], self._dashboard.get("/api/jobs/"))
        return {
            job.submission_id: JobState(job.status, job.message, job.driver_exit_code)
            for job in jobs if job.submission_id is not None}

    def kill(self, submission_id: str) -> None:
        """See `Jobs`. SIGTERM, then SIGKILL three seconds later."""
        self._end("POST", f"/api/jobs/{quote(submission_id, safe='')}/stop")

    def delete(self, submission_id: str) -> None:
        """See `Jobs`."""
        self._end("DELETE", f"/api/jobs/{quote(submission_id, safe='')}")

    def _end(self, method: str, path: str) -> None:
        answer = self._dashboard.send(method, path)
        if not answer.is_success and answer.status_code != 404:     # unknown: nothing is left to end
            raise refused(answer)


def entrypoint(submission: Submission, python: str = "python") -> str:
    """The driver's command line: fixed words and paths of ours; nothing in it is a user's."""
    words = [
        python, "-m", "moedisco_ray", "run", str(submission.config_path), "--json",
        "--stop-file", str(submission.stop_file), "--report-to", submission.report_url, "--run-id", submission.run,
    ]
    # Without the shell in between, a kill reaches the driver itself.
    return f"exec {shlex.join(words)}"

