"""A training waits or fails while its checkpoints' storage has faults, and resumes correctly.

The storage is away, slow, throttled, or cuts uploads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_s3 import Fault, FaultyS3, faulty_s3, uploads
from s3_standin import s3_server
from small_training import small_job, weights, write_inputs

from moedisco_ray.core.errors import StorageError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store import remote
from moedisco_ray.models import check_same
from moedisco_ray.training import TrainJob, TrainResult, World, train
from moedisco_ray.training.checkpoints import checkpoint

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

STEPS = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    write_inputs(home)
    return home


@pytest.fixture(scope="module")
def whole(home: Path) -> tuple[TrainJob, TrainResult]:
    job = small_job(home, home / "whole", home / "whole-steps", steps=STEPS)
    return job, run(job)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[tuple[FaultyS3, str]]:
    with s3_server("faulty") as server, faulty_s3(server) as (proxy, address):
        yield proxy, f"s3://faulty/{tmp_path.name}?endpoint_override={address}&scheme=http"


def run(job: TrainJob, emit: Callable[[Event], None] = lambda _event: None) -> TrainResult:
    return train(job, World(), emit, lambda: False)


def same_as(whole: tuple[TrainJob, TrainResult], job: TrainJob, result: TrainResult) -> None:
    assert result.losses == whole[1].losses
    check_same(weights(job), weights(whole[0]))


@pytest.mark.parametrize(("fault", "share"), [("throttle", 0.3), ("cut", 0.3), ("refuse", 0.3), ("slow", 1.0)])
def test_what_passes_is_waited_for(
    home: Path,
    proxy: tuple[FaultyS3, str],
    whole: tuple[TrainJob, TrainResult],
    tmp_path: Path,
    fault: Fault,
    share: float,
) -> None:
    proxy[0].faults = uploads(fault, share, seed=1)
    job = small_job(home, tmp_path / "out", proxy[1], steps=STEPS)
    same_as(whole, job, run(job))
    assert proxy[0].counts[fault] > 0
    proxy[0].faults = uploads("pass", 0, 0)
    assert checkpoint.steps(proxy[1]) == [6, 8]
    assert run(job).restored_step == STEPS


@pytest.mark.parametrize(
    ("fault", "file"),
    [
        ("cut", "__0_0.distcp"),
        ("cut", "metadata.json"),
        ("cut", "progress.json"),
        ("cut", "manifest.json"),
        ("refuse", "__0_0.distcp"),
    ],
)
def test_an_outage_at_any_file_is_told_and_never_leaves_half_a_checkpoint(
    home: Path,
    proxy: tuple[FaultyS3, str],
    whole: tuple[TrainJob, TrainResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    file: str,
) -> None:
    monkeypatch.setattr(remote, "RETRY_PAUSES", (0.1,))
    away = False

    def from_then_on(method: str, path: str) -> Fault:
        nonlocal away
        away = away or (method in ("PUT", "POST") and f"step-0000004/{file}" in path)
        return fault if away else "pass"

    proxy[0].faults = from_then_on
    job = small_job(home, tmp_path / "out", proxy[1], steps=STEPS)
    with pytest.raises(StorageError, match=r"does not answer"):
        run(job)
    proxy[0].faults = uploads("pass", 0, 0)
    assert checkpoint.steps(proxy[1]) == [2]
    resumed = run(job)
    assert resumed.restored_step == 2
    same_as(whole, job, resumed)
    assert checkpoint.steps(proxy[1]) == [6, 8]


def test_training_goes_on_beside_a_slow_upload(
    home: Path, proxy: tuple[FaultyS3, str], whole: tuple[TrainJob, TrainResult], tmp_path: Path
) -> None:
    proxy[0].faults = uploads("slow", 1.0, 0)
    events: list[Event] = []
    job = small_job(home, tmp_path / "out", proxy[1], steps=STEPS, every=3)
    same_as(whole, job, run(job, events.append))
    first = next(event.data for event in events if event.type == "checkpoint")
    assert first["step"] == 3
    assert first["latency"] > 0.1
