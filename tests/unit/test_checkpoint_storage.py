"""Checkpoints during a training: on a disk, and on servers of S3 and of Google Cloud Storage on loopback."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import examples
from gcs_standin import gcs_server
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs
from s3_standin import s3_server
from small_training import small_job, weights, write_inputs

from moedisco_ray.core.errors import ConfigError, StorageError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store import remote
from moedisco_ray.core.store.locations import Location, joined
from moedisco_ray.core.store.remote import Remote, resolve
from moedisco_ray.models import check_same
from moedisco_ray.policies import checkpointing
from moedisco_ray.training import TrainJob, TrainResult, World, train
from moedisco_ray.training.checkpoints import checkpoint, saver
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.checkpoints.manifest import HashingStream
from moedisco_ray.training.checkpoints.saver import Saver
from moedisco_ray.training.checkpoints.storage import Storage

STEPS = 6
FILES = ("__0_0.distcp", "metadata.json", "progress.json", "manifest.json")


class Died(BaseException):
    """The process, in the middle of a file."""


def run(job: TrainJob, emit: Callable[[Event], None] = lambda _event: None, stop_after: int = 1000) -> TrainResult:
    asked = iter(range(1, 1000))
    return train(job, World(), emit, lambda: next(asked) >= stop_after)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    write_inputs(home)
    return home


@pytest.fixture(scope="module")
def whole(home: Path) -> tuple[TrainJob, TrainResult]:
    """The undisturbed training."""
    job = small_job(home, home / "whole", home / "whole-steps", steps=STEPS)
    return job, run(job)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server("checkpoints") as server:
        yield f"s3://checkpoints?endpoint_override={server}&scheme=http"


@pytest.fixture(scope="module")
def google_bucket() -> Iterator[str]:
    with gcs_server("checkpoints") as uri:
        yield uri


@pytest.fixture(params=["disk", "s3", pytest.param("gcs", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    buckets = {"s3": "bucket", "gcs": "google_bucket"}
    if request.param == "disk":
        return tmp_path / "steps"
    return joined(request.getfixturevalue(buckets[request.param]), tmp_path.name)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "RETRY_PAUSES", (0.0, 0.0, 0.0))


@contextmanager
def slow_uploads(seconds: float) -> Iterator[None]:
    """Let training continue for some steps before anything is written."""
    write = Saver._write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "_write", lambda *args: time.sleep(seconds) or write(*args))
        yield


@contextmanager
def interfering(with_file: Callable[[str, int], None]) -> Iterator[None]:
    """Calls `with_file` with the name of each file that is written, and how many were begun before, in its middle."""
    writing = Storage.writing
    begun = iter(range(1000))

    @contextmanager
    def interfered(self: Storage, path: str) -> Iterator[HashingStream]:
        with writing(self, path) as stream:
            stream.write(b"")
            with_file(path.rpartition("/")[2], next(begun))
            yield stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "writing", interfered)
        yield


class AtOnce(ThreadPoolExecutor):
    """What is submitted is done when that returns."""

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        done = super().submit(*args, **kwargs)
        done.exception()
        return done


def parts() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 2)
    return model, torch.optim.AdamW(model.parameters())


def write(system: Any, path: str, data: bytes) -> None:
    with system.open_output_stream(path) as stream:
        stream.write(data)


def finished(whole: tuple[TrainJob, TrainResult], home: Path, place: Location, directory: Path) -> TrainJob:
    """The undisturbed training without its output, its checkpoints at a place."""
    job = small_job(home, directory / "out", place, steps=STEPS)
    shutil.copyfile(whole[0].key_file, job.key_file)
    theirs = Path(whole[0].checkpoints)
    for path in theirs.glob("*/*"):
        Remote(place, "place").upload(path, str(path.relative_to(theirs)))
    return job


def same_as(whole: tuple[TrainJob, TrainResult], job: TrainJob, result: TrainResult) -> None:
    assert result.losses == whole[1].losses
    check_same(weights(job), weights(whole[0]))


# --- beside the training


@settings(max_examples=examples(2, 5), deadline=None)
@given(saves=st.sets(st.integers(1, STEPS - 1)), stop=st.integers(1, STEPS), seconds=st.sampled_from([0.0, 0.01, 0.1]))
def test_saves_at_any_moment_change_nothing_and_are_of_their_moment(
    home: Path, whole: tuple[TrainJob, TrainResult], saves: set[int], stop: int, seconds: float
) -> None:
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch, slow_uploads(seconds):
        patch.setattr(Saver, "is_scheduled", lambda _, done: done in saves)
        job = small_job(home, Path(scratch) / "out", Path(scratch) / "steps", steps=STEPS, keep=100)
        stopped = run(job, stop_after=stop)
        assert set(checkpoint.steps(job.checkpoints)) == {save for save in saves if save <= stopped.steps} | {
            stopped.steps
        }
        for save in sorted(checkpoint.steps(job.checkpoints), reverse=True):
            checkpoint.discard_after(job.checkpoints, save)
            resumed = run(job)
            assert resumed.restored_step == save
            same_as(whole, job, resumed)
            checkpoint.discard_after(job.checkpoints, save - 1)


def test_training_stands_still_for_the_copy_alone_and_at_the_end_until_it_is_safe(home: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    with (
        slow_uploads(0.5),
        Saver(small_job(home, tmp_path, tmp_path / "steps"), *parts(), World(), events.append) as ours,
    ):
        ours.save(Progress(step=1))
        assert ours._upload is not None
        ours._upload.written.result()
        assert not ours.is_due()
        ours.save(Progress(step=2))
    beside, last = (event.data for event in events)
    assert (beside["step"], last["step"]) == (1, 2)
    assert beside["stall"] < 0.3
    assert beside["latency"] > 0.5
    assert 0.4 < last["stall"] <= last["latency"]


def test_what_fails_beside_the_training_is_raised_in_it(
    home: Path, place: Location, tmp_path: Path, no_pauses: None
) -> None:
    def away(name: str, begun: int) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION")

    job = small_job(home, tmp_path / "out", place, steps=STEPS)
    with interfering(away), pytest.raises(StorageError, match="NETWORK_CONNECTION"):
        run(job)
    assert checkpoint.latest(place) is None


def test_a_storage_that_comes_back_in_time_is_waited_for(
    home: Path, bucket: str, tmp_path: Path, whole: tuple[TrainJob, TrainResult], no_pauses: None
) -> None:
    def falters(name: str, begun: int) -> None:
        if begun % 3:
            raise OSError("AWS Error SLOW_DOWN")

    job = small_job(home, tmp_path / "out", joined(bucket, "falters"), steps=STEPS)
    with interfering(falters):
        same_as(whole, job, run(job))
    assert checkpoint.steps(job.checkpoints) == [4, 6]
    assert run(job).restored_step == STEPS


# --- complete or not at all


@pytest.mark.parametrize("file", [0, 3])
def test_a_torn_upload_is_never_resumed_and_cleaned_up(
    home: Path, place: Location, tmp_path: Path, whole: tuple[TrainJob, TrainResult], file: int
) -> None:
    def dies(name: str, begun: int) -> None:
        if begun == len(FILES) + file:  # in the second checkpoint, that of step 4
            raise Died

    job = small_job(home, tmp_path / "out", place, steps=STEPS)
    with interfering(dies), pytest.raises(BaseException, match="Died"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "abandon", lambda *_: None)  # a process that is gone cleans nothing up
        run(job)
    assert checkpoint.steps(place) == [2]
    resumed = run(job)
    assert resumed.restored_step == 2
    same_as(whole, job, resumed)
    system, root = resolve(place)
    left = [info.path for info in system.get_file_info(fs.FileSelector(root, recursive=True)) if info.is_file]
    assert {Path(path).parent.name for path in left} == {"step-0000004", "step-0000006"}


def test_a_checkpoint_without_all_of_its_bytes_is_none(
    home: Path, place: Location, tmp_path: Path, whole: tuple[TrainJob, TrainResult]
) -> None:
    job = finished(whole, home, place, tmp_path)
    system, root = resolve(place)
    for file in FILES:
        path = f"{root}/step-{STEPS:07d}/{file}"
        with system.open_input_stream(path) as stream:
            data = stream.read()
        for kept in (0, 10, len(data) // 2):
            write(system, path, data[:kept])
            assert checkpoint.steps(place) == [4], (file, kept)
        system.delete_file(path)
        assert checkpoint.steps(place) == [4]
        write(system, path, data)
        assert checkpoint.steps(place) == [4, STEPS]
    system.delete_file(f"{root}/step-{STEPS:07d}/{FILES[0]}")
    resumed = run(job)
    assert resumed.restored_step == 4
    same_as(whole, job, resumed)


@pytest.mark.parametrize("file", FILES[:-1])
def test_a_damaged_checkpoint_is_told_and_the_next_attempt_goes_on_from_the_one_before(
    home: Path, place: Location, tmp_path: Path, whole: tuple[TrainJob, TrainResult], file: str
) -> None:
    job = finished(whole, home, place, tmp_path)
    system, root = resolve(place)
    path = f"{root}/step-{STEPS:07d}/{file}"
    with system.open_input_stream(path) as stream:
        data = bytearray(stream.read())
    data[len(data) // 2] ^= 1
    write(system, path, bytes(data))
    with pytest.raises(StorageError, match=rf"{file} of checkpoint step-0000006 .* is damaged"):
        run(job)
    resumed = run(job)
    assert resumed.restored_step == 4
    same_as(whole, job, resumed)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_reads_badly_once_costs_no_checkpoint(
    home: Path,
    place: Location,
    tmp_path: Path,
    whole: tuple[TrainJob, TrainResult],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
) -> None:
    job = finished(whole, home, place, tmp_path)
    get, read = Storage.get, list[str]()

    def badly_once(self: Storage, name: str, positions: range | None = None) -> bytes:
        data = get(self, name, positions)
        read.append(name)
        return data[: len(data) // 2] if read.count(name) == 1 and name == f"step-{STEPS:07d}/{file}" else data

    monkeypatch.setattr(Storage, "get", badly_once)
    resumed = run(job)
    assert resumed.restored_step == STEPS
    assert read.count(f"step-{STEPS:07d}/{file}") >= 2
    same_as(whole, job, resumed)
    assert checkpoint.steps(place) == [4, STEPS]


def test_going_back_and_removing_work_on_any_storage(home: Path, place: Location, tmp_path: Path) -> None:
    run(small_job(home, tmp_path / "out", place, steps=STEPS, keep=3))
    assert checkpoint.steps(place) == [2, 4, 6]
    checkpoint.discard_after(place, 4)
    assert checkpoint.steps(place) == [2, 4]
    checkpoint.remove(place)
    assert checkpoint.latest(place) is None
    checkpoint.remove(place)


# --- where


@pytest.mark.parametrize("location", ["s3://nowhere-at-all/x", "nonsense://x"])
def test_a_storage_that_cannot_be_is_one_clear_line(home: Path, bucket: str, tmp_path: Path, location: str) -> None:
    if location.startswith("s3:"):
        location += "?" + bucket.partition("?")[2]
    with pytest.raises(ConfigError, match=r"^checkpoint\.storage: '.*cannot be used"):
        run(small_job(home, tmp_path / "out", location, steps=1))


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3://b/c/?endpoint_override=h:1&scheme=http", "s3://b/c/x/y?endpoint_override=h:1&scheme=http"),
        ("gs://b", "gs://b/x/y"),
        ("/disk", Path("/disk/x/y")),
        (Path("/disk"), Path("/disk/x/y")),
    ],
)
def test_options_stay_behind_a_uri(location: Location, expected: Location) -> None:
    assert joined(location, "x", "y") == expected


# --- when


@pytest.mark.parametrize("heard", [False, True])
def test_the_interval_follows_from_what_saves_cost_and_what_is_known_of_losses(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[TrainJob, TrainResult], heard: bool
) -> None:
    asked: list[tuple[checkpointing.SaveCost, float, int]] = []

    def at_once(cost: checkpointing.SaveCost, losses_per_hour: float, workers: int) -> float:
        asked.append((cost, losses_per_hour, workers))
        return 0.0

    monkeypatch.setattr(saver, "USUAL", checkpointing.Bounds(shortest=0.0))
    monkeypatch.setattr(saver, "interval", at_once)
    monkeypatch.setattr(saver, "ThreadPoolExecutor", AtOnce)
    events: list[Event] = []
    job = small_job(home, tmp_path / "out", tmp_path / "steps", steps=STEPS, every=None)
    hours = itertools.count(1)
    falling = (lambda: 0.7 / next(hours)) if heard else None
    result = train(
        dataclasses.replace(job, losses_per_hour=0.7), World(), events.append, lambda: False, losses_per_hour=falling
    )
    same_as(whole, job, result)
    saved = [event.data for event in events if event.type == "checkpoint"]
    assert [data["step"] for data in saved] == list(range(1, STEPS + 1))
    rates = [0.7 / hour if heard else 0.7 for hour in range(1, len(asked) + 1)]
    assert [(rate, workers) for _, rate, workers in asked] == [(rate, 1) for rate in rates]
    measured = [(round(cost.stall, 6), round(cost.latency or 0, 6)) for cost, _, _ in asked]
    assert measured == [(data["stall"], data["latency"]) for data in saved[:-2]]


def test_the_first_save_comes_soon_enough_to_measure(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = small_job(home, tmp_path / "out", tmp_path / "steps", every=None)
    now = time.monotonic()
    with Saver(job, *parts(), World(), lambda _event: None) as ours:
        for later, due in ((checkpointing.USUAL.shortest - 1, False), (checkpointing.USUAL.shortest + 1, True)):
            monkeypatch.setattr(saver.time, "monotonic", lambda later=later: now + later)
            assert ours.is_due() is due
