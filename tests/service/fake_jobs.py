"""A Ray without Ray: the jobs and pools that tests of the service talk to."""

from __future__ import annotations

from collections.abc import Collection

from service.domain.jobs import JobPhase, JobState
from service.errors import RayUnavailable
from service.ray_side.jobs import Submission
from service.schemas import PoolList, PoolStatus


class FakeJobs:
    """Jobs that live in memory; a test moves them along.

    Attributes:
        jobs: What Ray would say of each, by submission id.
        submissions: Every submission that started a job, by id.
        asked: Ids of all submissions that arrived, repeated ones too.
        killed: Ids that `kill` reached.
        away: Nothing answers.
        answers_lost: How many of the next submissions take place without their answer arriving.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, JobState] = {}
        self.submissions: dict[str, Submission] = {}
        self.asked: list[str] = []
        self.killed: list[str] = []
        self.away = False
        self.answers_lost = 0

    def submit(self, submission: Submission) -> None:
        self._answer()
        self.asked.append(submission.id)
        if submission.id not in self.jobs:
            self.jobs[submission.id] = JobState(JobPhase.PENDING)
            self.submissions[submission.id] = submission
        if self.answers_lost:
            self.answers_lost -= 1
            raise RayUnavailable("the answer was lost")

    def statuses(self) -> dict[str, JobState]:
        self._answer()
        return dict(self.jobs)

    def kill(self, submission_id: str) -> None:
        self._answer()
        self.killed.append(submission_id)
        job = self.jobs.get(submission_id)
        if job is not None and not job.phase.ended:
            self.jobs[submission_id] = JobState(JobPhase.STOPPED)

    def delete(self, submission_id: str) -> None:
        self._answer()
        self.jobs.pop(submission_id, None)

    def runs(self, submission_id: str) -> None:
        """The driver is under way."""
        self.jobs[submission_id] = JobState(JobPhase.RUNNING)

    def ends(self, submission_id: str, exit_code: int = 0) -> None:
        """The driver ended by itself."""
        failed = f"Job entrypoint command failed with exit code {exit_code}, last available logs (truncated):\nit broke"
        phase, message = (JobPhase.FAILED, failed) if exit_code else (JobPhase.SUCCEEDED, "Job finished successfully.")
        self.jobs[submission_id] = JobState(phase, message, exit_code)

    def dies(self, submission_id: str) -> None:
        """The driver was lost with its node."""
        self.jobs[submission_id] = JobState(JobPhase.FAILED, "Job supervisor actor died: the node was lost")

    def restart(self) -> None:
        """The head came back knowing nothing."""
        self.jobs.clear()

    def _answer(self) -> None:
        if self.away:
            raise RayUnavailable("Ray does not answer")


class FakePools:
    """Pools of a fixed size.

    Attributes:
        slots: Per resource; `busy` of them are taken.
        away: Nothing answers.
        autoscaled: An autoscaler may bring nodes.
    """

    def __init__(self, low_mem_gpu: float = 4, high_mem_gpu: float = 4) -> None:
        self.slots = {"low_mem_gpu": low_mem_gpu, "high_mem_gpu": high_mem_gpu}
        self.busy: dict[str, float] = {}
        self.away = False
        self.autoscaled = False

    def grows(self) -> bool:
        return self.autoscaled and not self.away

    def read(self, resources: Collection[str] = ()) -> PoolList:
        if self.away:
            return PoolList(connected=False, items=[])
        names = sorted({*self.slots, *resources})
        return PoolList(connected=True, items=[self._status(name) for name in names])

    def _status(self, name: str) -> PoolStatus:
        slots = self.slots.get(name, 0)
        free = slots - self.busy.get(name, 0)
        return PoolStatus(
            resource=name, slots=slots, free=free, gpus=0, nodes=[], price_per_hour=None, lost=0, pending=0
        )
