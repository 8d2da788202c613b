"""The queue of trainings, with made-up attempts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool, Optimizer
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.locations import Location
from moedisco_ray.execution.ray import backend
from moedisco_ray.execution.ray import queue as module
from moedisco_ray.execution.ray.attempts import AttemptContext
from moedisco_ray.execution.ray.event_mailbox import EventMailbox, RunMailbox
from moedisco_ray.execution.ray.forecast import RESTART_SECONDS
from moedisco_ray.execution.ray.mailbox_actor import MailboxActor
from moedisco_ray.execution.ray.queue import Queue
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.execution.submodel_progress import SubmodelProgress
from moedisco_ray.policies.quorum import ALL
from moedisco_ray.policies.retrying import End
from moedisco_ray.training import TrainJob, TrainResult
from moedisco_ray.training.checkpoints import checkpoint

NAMES = ("placed", "unplaced")


class Mail(EventMailbox):
    """Mail of two trainings; one has no slot yet."""

    def __init__(self) -> None:
        super().__init__(RunMailbox(None), check=lambda: None)
        self.events: list[Event] = []
        self.killed = {name: threading.Event() for name in NAMES}

    def push(self, event: Event) -> None:
        self.events.append(event)

    def begin(self, units: Collection[str], begun: Collection[str]) -> None:
        pass

    def status(self, unit: str) -> UnitStatus:
        return UnitStatus(("node",) if unit == "placed" else ())

    def statuses(self, units: Sequence[str]) -> dict[str, UnitStatus]:
        return {unit: self.status(unit) for unit in units}

    def losses_per_hour(self) -> float:
        return 0.1

    def held(self) -> dict[str, dict[str, float]]:
        return {}

    def kill_attempt(self, unit: str) -> None:
        self.killed[unit].set()


@pytest.fixture
def mail() -> Mail:
    return Mail()


@pytest.fixture
def end(tmp_path: Path) -> StopFile:
    return StopFile(tmp_path / "stop")


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mail: Mail, end: StopFile) -> Iterator[Queue]:
    """Of two trainings and room for both; the one saves when it is asked to, and the other waits until it is killed."""

    def attempt(job: TrainJob, context: AttemptContext) -> TrainResult | End:
        while job.name == "placed" and not end.requested:
            mail.killed[job.name].wait(0.001)
        if job.name == "unplaced":
            mail.killed[job.name].wait(10)
        if mail.killed[job.name].is_set():
            return End("died", 0, "its controller died")
        return TrainResult(3, 3, (), 1.0, 0, finished=False)

    monkeypatch.setattr(module, "attempt", attempt)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(module.session, "autoscales", lambda: False)
    monkeypatch.setattr(module.session, "room", lambda *_: 2)
    monkeypatch.setattr(module.session, "slots_staying", lambda _pool, _aside=(): 2)
    monkeypatch.setattr(module.session, "free_workers", lambda _bundle, _aside=(): 0)
    jobs = [
        TrainJob(
            stage="submodels",
            name=name,
            model=tmp_path,
            packed_dirs=(),
            output=tmp_path / name / "out",
            checkpoints=tmp_path / name / "steps",
            steps=10,
            sequence_length=1,
            optimizer=Optimizer(),
            checkpoint_every=5,
        )
        for name in NAMES
    ]
    context = AttemptContext(
        run="run",
        placement=Placement(LowMemoryPool(), 1, 3),
        directory=tmp_path,
        stop_files=(StopFile(), end),
        mailbox=mail,
    )
    with ThreadPoolExecutor(3) as threads:
        yield Queue(jobs, context, threads, SubmodelProgress(jobs, ALL, 1, tmp_path / "submodel_progress.json"))
        end.request("over")  # of a test that failed too: the threads are waited for
        mail.kill_attempt("unplaced")


def test_slots_that_came_are_handed_over_before_a_training_asks_for_one(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    attempt = module.attempt
    monkeypatch.setattr(module, "attempt", lambda job, context: order.append(job.name) or attempt(job, context))
    monkeypatch.setattr(
        queue,
        "_demand",
        SimpleNamespace(
            hand_over=lambda: order.append("handed over"), request_for=lambda *_: None, request=lambda _: None
        ),
    )
    queue.start()
    assert order[0] == "handed over"
    queue.start()
    assert order.count("handed over") == 1  # nothing else begins


def test_a_run_that_is_stopped_waits_for_checkpoints_and_for_no_slots(queue: Queue, mail: Mail, end: StopFile) -> None:
    queue.start()
    end.request("ended")
    queue.wait_for_ends()
    assert {name: killed.is_set() for name, killed in mail.killed.items()} == {"placed": False, "unplaced": True}


def test_what_an_earlier_driver_has_begun_is_waited_for_even_if_nothing_is_to_start(
    queue: Queue, end: StopFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: a driver that was stopped at once killed it without a checkpoint; one that had enough let it train."""
    joined: list[tuple[str, object]] = []

    def attempt(job: TrainJob, context: AttemptContext) -> TrainResult:
        joined.append((job.name, context.begun))
        return TrainResult(3, 3, (), 1.0, 0, finished=False)

    monkeypatch.setattr(module, "attempt", attempt)
    seat = SimpleNamespace(pool=LowMemoryPool())
    with monkeypatch.context() as patch, ThreadPoolExecutor(3) as threads:
        patch.setattr(Queue, "_claimed", lambda _queue: {"placed": (seat, "its attempt")})
        later = Queue(queue._jobs, queue._context, threads, queue._progress)
        later.resume()
        end.request("ended")
        later.wait_for_ends()
    assert joined == [("placed", (seat, "its attempt"))]


def test_one_that_hangs_is_killed_after_its_time(
    queue: Queue, mail: Mail, end: StopFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.1)
    monkeypatch.setattr(Mail, "status", lambda _mail, _unit: UnitStatus(("node",)))
    queue.start()
    end.request("ended")
    queue.wait_for_ends()
    assert mail.killed["unplaced"].is_set()


def test_what_runs_again_and_has_told_nothing_yet_has_its_newest_checkpoint_behind_it(
    queue: Queue, mail: Mail, end: StopFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    mailbox = MailboxActor()
    monkeypatch.setattr(mail, "statuses", mailbox.statuses)
    monkeypatch.setattr(checkpoint, "steps", lambda _location: [5])
    queue.start()
    mailbox.push(Event("progress", "submodels", "unplaced", {"step": 9, "tokens": 9, "tokens_per_second": 0.5}))
    assert sorted(queue.seconds_left[0]) == [2.0, 20.0 + RESTART_SECONDS]
    mail.kill_attempt("unplaced")
    while not queue.seconds_left[1]:
        queue.poll()
    assert queue.seconds_left[1] == [10.0 + RESTART_SECONDS]
    mailbox.begin_attempt("unplaced")
    queue.start()
    assert sorted(queue.seconds_left[0]) == [10.0 + RESTART_SECONDS, 20.0 + RESTART_SECONDS]
    end.request("ended")
    queue.wait_for_ends()


def test_the_forecast_counts_the_starts_of_what_waits(
    queue: Queue, mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    mailbox = MailboxActor()
    monkeypatch.setattr(mail, "statuses", mailbox.statuses)
    attempt = mailbox.begin_attempt("placed")
    mailbox.set_workers("placed", attempt, ("node",))
    event = Event(
        "progress", "submodels", "placed", {"step": 4, "tokens": 4, "tokens_per_second": 0.5}, time=time.time() + 7
    )
    assert queue.seconds_left[1] == [math.inf, math.inf]
    mailbox.push(event, attempt)
    assert queue.seconds_left[1] == pytest.approx([20 + 7, 20 + 7], abs=0.5)  # as long as the first one's start took
    mailbox.push(dataclasses.replace(event, time=time.time() + 90), attempt)
    assert queue.seconds_left[1] == pytest.approx([20 + 7, 20 + 7], abs=0.5)  # not as long as its steps take


@pytest.mark.parametrize(
    ("there", "grace", "warned"), [(2, "START_SECONDS", True), (0, "GRACE_SECONDS", True), (2, "GRACE_SECONDS", False)]
)
def test_a_pool_that_has_no_slot_for_anything_is_told_of_each_time(
    queue: Queue, mail: Mail, monkeypatch: pytest.MonkeyPatch, there: int, grace: str, warned: bool
) -> None:
    placed = list[str]()
    monkeypatch.setattr(mail, "status", lambda _unit: UnitStatus(tuple(placed)))
    monkeypatch.setattr(module.session, "slots_staying", lambda _pool, _aside=(): there)
    monkeypatch.setattr(
        module.session, "wait_message", lambda bundles, workers, *_: f"waits for {workers} of {next(iter(*bundles))}"
    )
    monkeypatch.setattr(module, grace, 0.0)
    for placed[:] in ([], [], ["node"], [], []):
        queue.start()
    assert [event.data["message"] for event in mail.events if event.type == "warning"] == [
        "waits for 1 of low_mem_gpu"
    ] * (2 * warned)


def test_a_slot_that_is_free_is_taken_soon_and_not_waited_for(
    queue: Queue, mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "status", lambda _unit: UnitStatus())
    monkeypatch.setattr(module.session, "free_workers", lambda _bundle, _aside=(): 1)
    monkeypatch.setattr(module, "START_SECONDS", 0.0)
    queue.start()
    queue.start()
    assert mail.events == []


def test_reads_at_the_queue_do_not_look_at_the_storage(
    queue: Queue, mail: Mail, end: StopFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Location] = []
    monkeypatch.setattr(checkpoint, "steps", lambda location: reads.append(location) or [5])
    for _ in range(10):
        assert len(queue.seconds_left[1]) == 2
    queue.start()
    for _ in range(10):
        assert len(queue.seconds_left[0]) == 2
    assert reads == []
    mail.kill_attempt("unplaced")
    while not reads:
        queue.poll()
    assert len(reads) == 1  # it waits again, and may have saved something
    end.request("ended")
    queue.wait_for_ends()


def test_events_that_cannot_be_written_end_the_trainers_at_once(
    tmp_path: Path, mail: Mail, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def full_disk() -> None:
        raise OSError(28, "No space left on device")

    def attempt(job: TrainJob, context: AttemptContext) -> TrainResult:
        mail.check = full_disk
        deadline = time.monotonic() + 10
        while not any(stop.requested for stop in context.stop_files) and time.monotonic() < deadline:
            time.sleep(0.001)
        ended.append(job.name)
        return TrainResult(3, 3, (), 1.0, 0, finished=time.monotonic() >= deadline)

    monkeypatch.setattr(module, "attempt", attempt)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(backend, "open_mailbox", lambda *_: contextlib.nullcontext(mail))
    monkeypatch.setattr(module.session, "autoscales", lambda: False)
    monkeypatch.setattr(module.session, "room", lambda *_: 1)
    job = TrainJob(
        stage="submodels",
        name="placed",
        model=tmp_path,
        packed_dirs=(),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=10,
        sequence_length=1,
        optimizer=Optimizer(),
        checkpoint_every=5,
    )
    with pytest.raises(OSError, match="No space left"):
        backend.train_all([job], Placement(LowMemoryPool(), 1, 3), tmp_path, lambda _: None)
    assert ended == ["placed"]
