"""Trainings of a run as Ray Train reports them, read from the Ray dashboard."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable

from service.domain.jobs import submitted_run
from service.errors import RayUnavailable
from service.ray_side.answers import TrainAttempt, TrainRun, TrainRunList, read_as
from service.ray_side.dashboard import Dashboard, parsed
from service.schemas import Training, TrainingAttempt, TrainingWorker

FRESH_SECONDS = 3.0
"""Maximum age of a cached response of Ray (s)."""
_PATH = "/api/train/v2/runs/v1"
_SUFFIX = re.compile(r"-[0-9a-f]{8}$")
"""Random suffix that makes a training's name unique, so that Ray Train treats each start as a new training."""


class RayTrainings:
    """Trainings that Ray Train knows, through the REST API of a dashboard; all readers share a response for a few seconds.

    Args:
        clock: Returns monotonic seconds.
    """

    def __init__(self, dashboard: Dashboard, clock: Callable[[], float] = time.monotonic) -> None:
        self._dashboard = dashboard
        self._clock = clock
        self._lock = threading.Lock()
        self._made = float("-inf")
        self._kept: list[TrainRun] | RayUnavailable = []

    def read(self, run_id: str, name: str) -> list[Training]:
        """Trainings of all attempts of a run, in order of their start; empty if Ray knows none.

        Args:
            run_id: Id of the run.
            name: Name of the run, with which the names of its trainings begin.

        Raises:
            RayUnavailable: Ray does not answer.
        """
        found = [(job, training) for training in self._all() if (job := _attempt_of(training, run_id)) is not None]
        return [_training(training, job, name) for job, training in sorted(found, key=lambda pair: pair[1].start_time_ns)]

    def _all(self) -> list[TrainRun]:
        # One thread sends the request while the others use the last response, so that a dashboard that hangs blocks only one.
        first = self._made == float("-inf")
        if self._clock() - self._made >= FRESH_SECONDS and self._lock.acquire(blocking=first):
            try:
                if self._clock() - self._made >= FRESH_SECONDS:
                    self._kept = self._ask()
            except RayUnavailable as error:
                self._kept = error
            finally:
                self._made = self._clock()
                self._lock.release()
        kept = self._kept
        if isinstance(kept, RayUnavailable):
            raise RayUnavailable(kept.detail)
        return kept

    def _ask(self) -> list[TrainRun]:
        answer = self._dashboard.send("GET", _PATH)
        # Ray answers with an error before the first training, and in versions without this path.
        return read_as(TrainRunList, parsed(answer)).train_runs if answer.is_success else []


def _attempt_of(training: TrainRun, run_id: str) -> int | None:
    """Number of the run's attempt that started a training; None if another run started it."""
    job = training.job_details
    found = submitted_run(job.submission_id) if job is not None and job.submission_id is not None else None
    return found[1] if found is not None and found[0] == run_id else None


def _training(training: TrainRun, attempt: int, name: str) -> Training:
    return Training(
        unit=_SUFFIX.sub("", training.name).removeprefix(f"{name}-"),
        run_attempt=attempt,
        state=training.status,
        detail=training.status_detail,
        started=training.start_time_ns / 1e9,
        ended=_seconds(training.end_time_ns),
        attempts=[_attempt(each) for each in training.attempts],
    )


def _attempt(attempt: TrainAttempt) -> TrainingAttempt:
    return TrainingAttempt(
        state=attempt.status,
        detail=attempt.status_detail,
        started=attempt.start_time_ns / 1e9,
        ended=_seconds(attempt.end_time_ns),
        workers=[
            TrainingWorker(rank=each.world_rank, node=each.node_ip, state=each.status, gpus=each.gpu_ids)
            for each in sorted(attempt.workers, key=lambda each: each.world_rank)])


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / 1e9
