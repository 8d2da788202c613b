"""A gang in the queue, on a cluster where attempts are made up and machines come and go as a script says."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import HighMemoryPool, Optimizer
from moedisco_ray.core.errors import RunStopped, TrainingError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.execution.ray import backend, queue, session
from moedisco_ray.execution.ray.attempts import AttemptContext
from moedisco_ray.execution.ray.event_mailbox import EventMailbox, RunMailbox
from moedisco_ray.execution.ray.gang import GangSize
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.policies.gang import Sizes
from moedisco_ray.policies.retrying import End
from moedisco_ray.training import TrainJob, TrainResult
from moedisco_ray.training.checkpoints import checkpoint

STEPS = 1000


@dataclasses.dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@dataclasses.dataclass
class Stops:
    """What ends an attempt, besides the end of the whole run."""

    files: Sequence[StopFile]

    @property
    def requested(self) -> bool:
        return any(file.requested for file in self.files)


class Scripted(EventMailbox):
    """A cluster, its mailbox and its reservation; its attempts are functions, taken one after the other."""

    def __init__(self, slots: int | list[int], *attempts: Callable[[Scripted, int, Stops], TrainResult | End]) -> None:
        super().__init__(RunMailbox(None), check=self.fail)
        self.slots = [slots] if isinstance(slots, int) else slots
        self.attempts = list(attempts)
        self.boot_times = [1e9]
        self.max_slots = math.inf
        self.now = UnitStatus()
        self.sizes: list[int] = []
        self.micro_batches: list[int | None] = []
        self.requested: list[int] = []
        self.grace = 60.0
        self.events: list[Event] = []
        self.failure: OSError | None = None

    @property
    def free_slots(self) -> int:
        return self.slots[0] if len(self.slots) == 1 else self.slots.pop(0)

    def request(self, workers: int) -> None:
        self.requested.append(workers)

    def attempt(self, job: TrainJob, context: AttemptContext) -> TrainResult | End:
        workers = context.placement.workers
        self.sizes.append(workers)
        self.micro_batches.append(job.optimizer.micro_batch)
        return self.attempts.pop(0)(self, workers, Stops(context.stop_files[1:]))

    def fail(self) -> None:
        if self.failure is not None:
            raise self.failure

    def push(self, event: Event) -> None:
        self.events.append(event)

    def begin(self, units: Collection[str], begun: Collection[str]) -> None:
        pass

    def statuses(self, units: Sequence[str]) -> dict[str, UnitStatus]:
        return dict.fromkeys(units, self.now)

    def losses_per_hour(self) -> float:
        return 0.1

    def kill_attempt(self, unit: str) -> None:
        pass

    def held(self) -> dict[str, dict[str, float]]:
        return {}

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.type == kind]


class Size(GangSize):
    """A gang's size by the script's slots."""

    @property
    def _free_slots(self) -> int:
        return self._reservation.free_slots


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def stop_within(stop: Stops, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.001)
    return stop.requested


def result(steps: int = STEPS) -> TrainResult:
    return TrainResult(steps, steps, (), 1.0, 0, finished=steps == STEPS)


def finishes(cluster: Scripted, workers: int, stop: Stops) -> TrainResult:
    return result()


def ends(kind: str) -> Callable[[Scripted, int, Stops], End]:
    def attempt(cluster: Scripted, workers: int, stop: Stops) -> End:
        return End(kind, 5, "its end")

    return attempt


def trains_until_stopped(step: int, slots: int) -> Callable[[Scripted, int, Stops], TrainResult]:
    """Makes steps of a second; meanwhile slots come."""

    def attempt(cluster: Scripted, workers: int, stop: Stops) -> TrainResult:
        cluster.now = UnitStatus((), step, 1.0)
        cluster.slots = [slots]
        wait_until(lambda: stop.requested)
        return result(step)

    return attempt


Gang = Callable[..., Trained]


@pytest.fixture
def gang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gang:
    """Trains a gang on a scripted cluster."""

    def train(cluster: Scripted, sizes: Sizes, stop: StopFile = NEVER, failures: int = 3) -> Trained:
        monkeypatch.setattr(queue, "attempt", cluster.attempt)
        monkeypatch.setattr(queue, "POLL_SECONDS", 0.001)
        monkeypatch.setattr(queue, "GRACE_SECONDS", cluster.grace)
        monkeypatch.setattr(checkpoint, "steps", lambda _location: [])
        monkeypatch.setattr(backend, "open_mailbox", lambda *_: contextlib.nullcontext(cluster))
        for name, found in (
            ("autoscales", True),
            ("room", 8),
            ("slots_staying", 0),
            ("free_workers", 0),
            ("wait_message", f"waits for {sizes.fewest}"),
        ):
            monkeypatch.setattr(session, name, lambda *_arguments, found=found: found)
        monkeypatch.setattr(session, "max_slots", lambda _pool: cluster.max_slots)
        job = TrainJob(
            stage="finetune",
            name="finetune",
            model=tmp_path,
            packed_dirs=(),
            output=tmp_path / "out",
            checkpoints=tmp_path / "home" / "steps",
            steps=STEPS,
            sequence_length=1,
            optimizer=Optimizer(batch_tokens=sizes.batch),
            checkpoint_every=10,
        )
        placement = Placement(HighMemoryPool(), sizes.fewest, failures)
        size = Size(placement, sizes, cluster, Clock())
        [trained] = backend.train_all([job], placement, tmp_path, lambda _: None, stop=stop, gang=size)
        return trained

    return train


@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 8), st.integers(0, 16))
def test_a_size_is_within_bounds_and_slots_and_keeps_the_batch(batch: int, fewest: int, more: int, slots: int) -> None:
    sizes = Sizes(batch, fewest, fewest + more)
    size = sizes.on(slots)
    if size is not None:
        assert fewest <= size <= min(slots, fewest + more)
        assert batch % size == 0 or not more
        assert size <= sizes.asked(slots) <= sizes.asked(fewest + more)
    elif slots >= fewest:
        assert more
        assert all(batch % n for n in range(fewest, min(slots, fewest + more) + 1))


@given(
    st.integers(1, 64), st.integers(1, 8), st.integers(0, 8), st.floats(0, 16) | st.just(math.inf), st.integers(0, 20)
)
def test_what_is_asked_for_could_come_and_becomes_less_where_it_does_not(
    batch: int, fewest: int, more: int, slots: float, times: int
) -> None:
    sizes = Sizes(batch, fewest, fewest + more)
    asked = sizes.asked(slots, times)
    assert fewest <= asked <= max(fewest, min(slots, fewest + more))
    assert asked == fewest or sizes.on(asked) == asked
    assert sizes.asked(slots, times + 1) < asked or asked == sizes.asked(slots, 100)


def test_it_asks_for_no_more_than_there_may_ever_be_and_for_less_when_that_does_not_come(gang: Gang) -> None:
    cluster = Scripted([0] * 40 + [1], finishes)
    cluster.boot_times, cluster.max_slots = [5.0], 5
    gang(cluster, Sizes(8, 1, 8))
    assert list(dict.fromkeys(cluster.requested)) == [4, 2, 1, 0]


def test_it_begins_with_what_there_is(gang: Gang) -> None:
    cluster = Scripted(3, finishes)
    assert gang(cluster, Sizes(8, 1, 8)).result.finished
    assert cluster.sizes == [2]
    assert [event.type for event in cluster.events] == ["unit_finished"]


def test_it_waits_for_all_or_nothing_and_says_so_once(gang: Gang) -> None:
    cluster = Scripted([0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 4], finishes)
    cluster.grace = 0.0
    gang(cluster, Sizes(8, 4, 4))
    assert cluster.sizes == [4]
    assert [event.data["message"] for event in cluster.of("warning")] == ["waits for 4"]
    # It asked for its nodes while it waited, but not while slots that were just freed may be missing, and for none in
    # the end.
    waited = cluster.requested.index(0)
    assert 0 < waited < 10
    assert set(cluster.requested[:waited]) == {4}
    assert not any(cluster.requested[waited:])


def test_a_moment_without_slots_is_not_worth_a_word(gang: Gang) -> None:
    cluster = Scripted([0, 0, 1], finishes)
    gang(cluster, Sizes(8, 1, 2))
    assert not cluster.of("warning")


def test_a_loss_shrinks_it_and_is_no_failure(gang: Gang) -> None:
    cluster = Scripted([4, 2, 2, 2, 4], *[ends("preempted")] * 4, finishes)
    gang(cluster, Sizes(8, 1, 4), failures=0)
    assert cluster.sizes == [4, 2, 2, 2, 4]
    assert [event.data["kind"] for event in cluster.of("worker_restarted")] == ["preempted"] * 4
    assert not any(cluster.requested)


def test_out_of_memory_halves_what_a_worker_had_of_the_batch_and_not_what_the_smallest_gang_would_have(
    gang: Gang,
) -> None:
    cluster = Scripted([8, 8, 2, 2], ends("out_of_memory"), ends("preempted"), ends("out_of_memory"), finishes)
    gang(cluster, Sizes(64, 1, 8))
    assert cluster.sizes == [8, 8, 2, 2]
    assert cluster.micro_batches == [64, 4, 4, 2]


def test_failures_are_bounded(gang: Gang) -> None:
    cluster = Scripted(1, *[ends("died")] * 3)
    with pytest.raises(TrainingError, match="finetune: failed 3 times"):
        gang(cluster, Sizes(8, 1, 1), failures=2)
    assert cluster.sizes == [1, 1, 1]


def test_it_grows_when_that_is_worth_the_restart(gang: Gang) -> None:
    cluster = Scripted(1, trains_until_stopped(100, slots=1), finishes)
    gang(cluster, Sizes(8, 1, 4))
    # The slot that it left is not free yet, but it waits for no less than what it stopped for.
    assert cluster.sizes == [1, 2]
    assert [event.data["kind"] for event in cluster.of("worker_restarted")] == ["grown"]


def test_a_gang_that_dies_as_it_is_about_to_grow_starts_with_what_is_left(gang: Gang) -> None:
    def dies_when_stopped(cluster: Scripted, workers: int, stop: Stops) -> End:
        trains_until_stopped(100, slots=1)(cluster, workers, stop)
        return End("preempted", 100, "its end")

    cluster = Scripted(1, dies_when_stopped, finishes)
    gang(cluster, Sizes(8, 1, 4))
    assert cluster.sizes == [1, 1]


@pytest.mark.parametrize(("sizes", "step"), [(Sizes(8, 1, 4), STEPS - 1), (Sizes(8, 1, 1), 100), (Sizes(6, 2, 4), 100)])
def test_it_stays_where_growing_would_not_help(gang: Gang, sizes: Sizes, step: int) -> None:
    def attempt(cluster: Scripted, workers: int, stop: Stops) -> TrainResult:
        cluster.now = UnitStatus((), step, 1.0)
        cluster.slots = [0 if sizes.fewest == 2 else 3]
        looked = len(cluster.requested)
        wait_until(lambda: stop.requested or len(cluster.requested) >= looked + 3)
        assert not stop.requested
        return result()

    cluster = Scripted(2, attempt)
    gang(cluster, sizes)
    assert len(cluster.sizes) == 1


def test_an_attempt_that_starts_up_does_not_grow_by_what_the_one_before_it_told(gang: Gang) -> None:
    def dies_at_100(cluster: Scripted, workers: int, stop: Stops) -> End:
        cluster.now = UnitStatus(("node",), 100, 1.0)
        return End("died", 100, "its end")

    def starts_up(cluster: Scripted, workers: int, stop: Stops) -> TrainResult:
        cluster.slots = [3]
        for where in (cluster.now, UnitStatus((), 0, 1.0), UnitStatus(("node",), 0, 1.0)):
            cluster.now = where
            assert not stop_within(stop, 0.05)
        cluster.now = UnitStatus(("node",), 100, 1.1)  # the same step again, from a checkpoint before it
        wait_until(lambda: stop.requested)
        return result(100)

    cluster = Scripted(1, dies_at_100, starts_up, finishes)
    gang(cluster, Sizes(8, 1, 4))
    assert cluster.sizes == [1, 1, 4]


@pytest.mark.parametrize(("boot", "asked"), [(100.0, 3), (950.0, 0), (1e9, 0)])
def test_more_nodes_are_asked_for_if_there_will_be_enough_left_to_do(gang: Gang, boot: float, asked: int) -> None:
    def attempt(cluster: Scripted, workers: int, stop: Stops) -> TrainResult:
        cluster.now = UnitStatus((), 100, 1.0)
        cluster.slots = [0]
        looked = len(cluster.requested)
        wait_until(lambda: len(cluster.requested) >= looked + 3)
        return result()

    cluster = Scripted(1, attempt)
    cluster.boot_times = [boot]
    gang(cluster, Sizes(8, 1, 4))
    assert next((workers for workers in reversed(cluster.requested) if workers), 0) == asked


def test_a_stopped_run_ends_the_workers_first(gang: Gang, tmp_path: Path) -> None:
    stop = StopFile(tmp_path / "stop")

    def attempt(cluster: Scripted, workers: int, end: Stops) -> TrainResult:
        stop.request("by hand")
        wait_until(lambda: end.requested)
        return result(7)

    cluster = Scripted(1, attempt)
    with pytest.raises(RunStopped, match="by hand"):
        gang(cluster, Sizes(8, 1, 1), stop)
    assert cluster.sizes == [1]


def test_a_stopped_run_waits_for_no_slots(gang: Gang, tmp_path: Path) -> None:
    stop = StopFile(tmp_path / "stop")
    stop.request("by hand")
    with pytest.raises(RunStopped):
        gang(Scripted(0), Sizes(8, 1, 1), stop)


def test_events_that_cannot_be_written_end_an_attempt_under_way(gang: Gang) -> None:
    saved: list[bool] = []

    def trains(cluster: Scripted, workers: int, stop: Stops) -> TrainResult:
        cluster.failure = OSError(28, "No space left on device")
        wait_until(lambda: stop.requested)
        saved.append(True)
        return result(3)

    with pytest.raises(OSError, match="No space left"):
        gang(Scripted(1, trains), Sizes(8, 1, 1))
    assert saved


def test_events_that_cannot_be_written_end_the_wait_for_slots(gang: Gang) -> None:
    cluster = Scripted(0)
    cluster.failure = OSError(28, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        gang(cluster, Sizes(8, 1, 1))
