"""What a gang held, as later drivers read it, with made-up attempts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import HighMemoryPool, Optimizer
from moedisco_ray.core.stop_file import NEVER
from moedisco_ray.execution.ray import gang_cluster
from moedisco_ray.execution.ray.attempts import AttemptContext
from moedisco_ray.execution.ray.autoscaling.reservation import Reservation
from moedisco_ray.execution.ray.event_mailbox import EventMailbox
from moedisco_ray.execution.ray.gang_cluster import _RayGangCluster
from moedisco_ray.training import TrainJob, TrainResult


class Driver(EventMailbox):
    """A driver's time, and what its meter says of the gang."""

    def __init__(self) -> None:
        super().__init__(handle=None, check=lambda: None)
        self.now = 0.0
        self.seconds = 0.0

    def passes(self, seconds: float, workers: int) -> None:
        self.now += seconds
        self.seconds += seconds * workers

    def held(self) -> dict[str, dict[str, float]]:
        return {"finetune": {"high_memory": self.seconds}} if self.seconds else {}

    def emit(self, *_: object) -> None:
        pass


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return TrainJob(
        stage="finetune", name="finetune", model=tmp_path, packed_dirs=(), output=tmp_path / "out", checkpoints=tmp_path / "steps",
        steps=10, sequence_length=1, optimizer=Optimizer(batch_tokens=8), checkpoint_every=5)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Driver], _RayGangCluster]:
    """A new driver's."""
    monkeypatch.setattr(gang_cluster.session, "autoscales", lambda: False)
    monkeypatch.setattr(_RayGangCluster, "emit", Driver.emit)

    def new(driver: Driver) -> _RayGangCluster:
        pool = HighMemoryPool()
        context = AttemptContext(
            run="run", placement=Placement(pool, 1, 0), directory=tmp_path, stop_files=(), mailbox=driver)
        return _RayGangCluster(context, "finetune", Reservation(pool, "ahead"), tmp_path / "gang.json", lambda: driver.now)

    return new


def test_a_driver_that_dies_loses_seconds_of_an_attempt_and_its_next_counts_nothing_twice(
    job: TrainJob, cluster: Callable[[Driver], _RayGangCluster], monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = TrainResult(10, 10, (), 1.0, 0, finished=True)
    seen: list[float] = []

    def attempt(job: TrainJob, context: AttemptContext) -> TrainResult:
        """Train for 25 seconds; every 5 seconds a new driver reads what this one has saved."""
        for _ in range(5):
            driver.passes(5, context.placement.workers)
            here.save_held()
            seen.append(cluster(Driver()).finish(job, outcome).worker_seconds)
        return outcome

    monkeypatch.setattr(gang_cluster, "attempt", attempt)
    driver = Driver()
    here = cluster(driver)
    here.attempt(job, 2, NEVER)
    here.attempt(job, 4, NEVER)
    assert seen == [0, 20, 20, 40, 40, 50, 90, 90, 130, 130]
    trained = here.finish(job, outcome)
    assert (trained.seconds, trained.held) == (50, {"high_memory": 150})
    driver = Driver()
    here = cluster(driver)
    here.attempt(job, 1, NEVER)
    trained = here.finish(job, outcome)
    assert (trained.seconds, trained.held) == (75, {"high_memory": 175})
