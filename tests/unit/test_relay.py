"""Events on their way to whoever writes them, whatever becomes of the block they come from, or of the disk."""

from __future__ import annotations

import threading
import time

import pytest

from moedisco_ray.errors import TrainingError
from moedisco_ray.events import Event
from moedisco_ray.on_ray.relay import pumped


class Box:
    """A mailbox."""

    def __init__(self, *events: Event) -> None:
        self.events = list(events)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events


def full_disk(event: Event) -> None:
    raise OSError(28, "No space left on device")


def test_what_was_pushed_last_arrives_though_the_block_raises() -> None:
    box, seen = Box(), []
    with pytest.raises(TrainingError, match="poisoned"), pumped(box.take, seen.append, 60.0):
        box.events.append(last := Event("workers_released", data={"hold": "a"}))
        raise TrainingError("poisoned")
    assert seen == [last]


def test_events_arrive_in_order_while_the_block_runs() -> None:
    box, seen, arrived = Box(Event("progress"), Event("checkpoint")), [], threading.Event()

    def emit(event: Event) -> None:
        seen.append(event.type)
        if event.type == "checkpoint":
            arrived.set()

    with pumped(box.take, emit, 0.001) as check:
        assert arrived.wait(10)
        check()
        box.events.append(Event("unit_finished"))
    assert seen == ["progress", "checkpoint", "unit_finished"]


def test_a_full_disk_is_noticed_inside_the_block() -> None:
    box = Box(Event("progress"))
    with pytest.raises(OSError, match="No space left"), pumped(box.take, full_disk, 0.001) as check:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            check()
            time.sleep(0.001)
        pytest.fail("nobody noticed")


def test_a_full_disk_is_noticed_at_the_end_of_the_block() -> None:
    with pytest.raises(OSError, match="No space left"), pumped(Box(Event("progress")).take, full_disk, 60.0):
        pass


def test_the_blocks_own_error_goes_before_that_of_a_full_disk() -> None:
    with pytest.raises(TrainingError, match="poisoned"), pumped(Box(Event("progress")).take, full_disk, 60.0):
        raise TrainingError("poisoned")
