"""Ray Jobs that run drivers, one for each attempt of a run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from moedisco_ray.core.store.read_roots import ENVIRONMENT as READ_ROOTS
from moedisco_ray.core.store.read_roots import ReadRoots
from service.domain.jobs import JobState
from service.ray_side.answers import Job, read_as
from service.ray_side.dashboard import Dashboard, refused


@dataclasses.dataclass(frozen=True)
class Submission:
    """A driver to start.

    Attributes:
        id: Submission id; see `service.domain.jobs.submission_id`.
        run: Id of the run.
        config_path: Configuration of the run, as JSON.
        stop_file: File whose existence makes the driver stop with a checkpoint.
        report_to: Private file from which the driver learns where it reports and with which key.
        read_roots: Places that the driver and its workers may read.
        reuses: Paths or URIs of other runs, from which the driver may take stages.
        functions: Functions that the driver may call (`moedisco run --allow-code`), as the operator named them.
        metadata: Metadata that the Ray dashboard shows with the job.
    """

    id: str
    run: str
    config_path: Path
    stop_file: Path
    report_to: Path
    read_roots: ReadRoots = dataclasses.field(default_factory=ReadRoots)
    reuses: Sequence[str] = ()
    functions: Sequence[str] = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)


class RayJobs:
    """Jobs of a Ray cluster, through the REST API of its dashboard. Every method may raise `RayUnavailable`.

    Args:
        python: Interpreter that runs the driver; by default that of the head node.
    """

    def __init__(self, dashboard: Dashboard, python: str = "python") -> None:
        self._dashboard = dashboard
        self._python = python

    def submit(self, submission: Submission) -> None:
        """Start a driver, unless a job with this id exists.

        The job holds no secret: every user of a node can read command lines, and Ray shows environments to all who see
        its jobs.
        """
        answer = self._dashboard.send(
            "POST",
            "/api/jobs/",
            body={
                "submission_id": submission.id,
                "entrypoint": entrypoint(submission, self._python),
                "runtime_env": {
                    "env_vars": {READ_ROOTS: submission.read_roots.to_json(), "RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
                },
                "metadata": dict(submission.metadata),
            },
        )
        # Ray answers a repeated id with the same 500 as any failure, so check whether it knows the job now.
        if not answer.is_success and submission.id not in self.statuses():
            raise refused(answer)

    def statuses(self) -> dict[str, JobState]:
        """All jobs that Ray knows, by submission id; after a restart of the head node, Ray knows none."""
        jobs = read_as(list[Job], self._dashboard.get("/api/jobs/"))
        return {
            job.submission_id: JobState(job.status, job.message, job.driver_exit_code)
            for job in jobs
            if job.submission_id is not None
        }

    def kill(self, submission_id: str) -> None:
        """End the driver of a job, if it runs.

        Ray sends SIGTERM, at which the driver uploads its last events and exits, and SIGKILL if it still runs after
        RAY_JOB_STOP_WAIT_TIME_S. That is 60 s in our cluster files, and 3 s by default, as in a local Ray.
        """
        self._end("POST", f"/api/jobs/{quote(submission_id, safe='')}/stop")

    def delete(self, submission_id: str) -> None:
        """Delete an ended job from Ray; does nothing if the job is unknown."""
        self._end("DELETE", f"/api/jobs/{quote(submission_id, safe='')}")

    def _end(self, method: str, path: str) -> None:
        answer = self._dashboard.send(method, path)
        if not answer.is_success and answer.status_code != 404:  # an unknown job needs no deletion
            raise refused(answer)


def entrypoint(submission: Submission, python: str = "python") -> str:
    """Command line of the driver; it contains only fixed words, places of runs, and what the operator named."""
    words = [
        python,
        "-P",
        "-m",
        "moedisco_ray",
        "run",
        str(submission.config_path),
        "--json",
        "--stop-file",
        str(submission.stop_file),
        "--report-to",
        str(submission.report_to),
        "--run-id",
        submission.run,
    ]
    for place in submission.reuses:
        words += ["--reuse", place]
    for function in submission.functions:
        words += ["--allow-code", function]
    # `exec` replaces the shell, so that signals reach the driver.
    return f"exec {shlex.join(words)}"
