"""A function that waits for a slot of its pool: it is not charged, it can be stopped, and it says what it waits for."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray import cloudpickle
from small_run import small_config
from waiting import until

from moedisco_ray.core.config import HighMemoryPool, LowMemoryPool, Pool
from moedisco_ray.core.errors import CorpusError, RunError, RunStopped
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.execution.ray.backend import RayBackend

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]

SLOTS = {"high_mem_gpu": 3, "low_mem_gpu": 2}
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it


class Occupant:
    """Holds what it was started with for as long as it lives."""

    def here(self) -> None:
        """Answers once it lives."""


@pytest.fixture
def pool() -> Pool:
    """A pool on whose seats the functions run."""
    return HighMemoryPool()


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[RayBackend]:
    with RayBackend(small_config(tmp_path)) as opened:
        yield opened


@contextlib.contextmanager
def occupied(pool: Pool) -> Iterator[Callable[[], None]]:
    """Hold all slots of a pool inside the block; gives what frees them earlier."""
    slots = SLOTS[pool.resource]
    until(lambda: ray.available_resources().get(pool.resource, 0) == slots)
    occupant = ray.remote(num_cpus=0, resources={pool.resource: slots})(Occupant).remote()
    ray.get(occupant.here.remote())
    try:
        yield lambda: ray.kill(occupant)
    finally:
        ray.kill(occupant)


def double(number: int, by: int = 2) -> int:
    return number * by


def leave(mark: Path) -> None:
    mark.touch()


def refuse() -> None:
    raise CorpusError("corpus", "text", "add some")


def fail() -> None:
    raise ZeroDivisionError("no")


def die(held: Path) -> None:
    """Once the slot is known to be held: the word that the function has begun dies with a worker that is too quick."""
    while not held.exists():
        time.sleep(0.01)
    held.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_first(held: Path, mark: Path) -> str:
    if not mark.exists():
        mark.touch()
        die(held)
    return "lives"


def types(events: list[Event]) -> list[str]:
    return [event.type for event in events]


def test_a_run_that_waits_for_a_slot_says_so_is_not_charged_and_can_be_stopped(
    backend: RayBackend, pool: Pool, tmp_path: Path
) -> None:
    events = list[Event]()
    stop, mark = StopFile(tmp_path / "stop"), tmp_path / "mark"
    with occupied(pool), ThreadPoolExecutor(1) as thread:
        call = thread.submit(backend.call, pool, events.append, stop, leave, mark)
        try:
            until(lambda: events)
        finally:
            stop.request("cancelled")
        with pytest.raises(RunStopped, match="cancelled"):
            call.result()
        assert [event.data for event in events] == [
            {"message": f"waits for 1 {pool.resource}: 0 of {SLOTS[pool.resource]} are free"}
        ]
        assert types(events) == ["warning"]
    # The slots are free again, and its task is not among those that wait for one.
    assert backend.call(pool, events.append, NEVER, double, 3) == 6
    assert not mark.exists()


def test_a_slot_is_held_from_when_the_function_begins_until_it_ends(
    backend: RayBackend, pool: Pool, tmp_path: Path
) -> None:
    events, stop = list[Event](), StopFile(tmp_path / "stop")
    with occupied(pool) as free, ThreadPoolExecutor(1) as thread:
        call = thread.submit(backend.call, pool, events.append, stop, double, 3, by=5)
        try:
            until(lambda: events)
            assert types(events) == ["warning"]
            free()
            assert call.result() == 15
        finally:
            stop.request("the test ends")
    assert types(events) == ["warning", "workers_held", "workers_released"]
    assert events[1].data | {"hold": ""} == {"hold": "", "pool": pool.key, "workers": 1}
    assert events[1].data["hold"] == events[2].data["hold"]


def test_what_holds_no_pool_is_not_metered(backend: RayBackend) -> None:
    events: list[Event] = []
    assert backend.call(None, events.append, NEVER, double, 3) == 6
    assert events == []


def test_errors_come_through_as_they_were_raised(backend: RayBackend, pool: Pool, tmp_path: Path) -> None:
    events = list[Event]()
    with pytest.raises(CorpusError, match="add some") as caught:
        backend.call(pool, events.append, NEVER, refuse)
    assert type(caught.value) is CorpusError
    with pytest.raises(RunError, match="fail: ZeroDivisionError"):
        backend.call(pool, events.append, NEVER, fail)
    with pytest.raises(FileNotFoundError):
        backend.call(pool, events.append, NEVER, leave, tmp_path / "nowhere" / "mark")
    assert types(events) == ["workers_held", "workers_released"] * 3


def test_a_worker_that_dies_is_replaced_and_each_is_charged_for_itself(
    backend: RayBackend, pool: Pool, tmp_path: Path
) -> None:
    events, held = list[Event](), tmp_path / "held"

    def emit(event: Event) -> None:
        events.append(event)
        if event.type == "workers_held":
            held.touch()

    assert backend.call(pool, emit, NEVER, die_at_first, held, mark=tmp_path / "mark") == "lives"
    assert types(events) == ["workers_held", "workers_released"] * 2
    held.unlink()  # of the slot of the one that lived
    with pytest.raises(RunError, match="die: its worker died repeatedly"):
        backend.call(pool, emit, NEVER, die, held)
    assert types(events) == ["workers_held", "workers_released"] * 6


def test_a_seat_sees_no_gpu_that_it_does_not_hold(backend: RayBackend) -> None:
    def seen() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    # Ray Train's local mode would train on any GPU that it sees, also on one that another seat holds.
    assert backend.call(LowMemoryPool(), lambda _: None, NEVER, seen) == ""


def test_an_error_of_a_gpu_reaches_no_later_work(backend: RayBackend) -> None:
    def process() -> int:
        return backend.call(LowMemoryPool(), lambda _: None, NEVER, os.getpid)

    def breaks() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    before = process()
    assert process() == before
    with pytest.raises(RunError, match="illegal memory access"):
        backend.call(LowMemoryPool(), lambda _: None, NEVER, breaks)
    assert process() != before
