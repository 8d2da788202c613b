"""A function that waits for its slot: it is not charged, it can be stopped, and the run says what it waits for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import ray
from small_run import small_config

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import HighMemoryPool
from moedisco_ray.core.errors import RunStopped
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.core.store.run_work import Files
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.tasks import wait_for_start
from moedisco_ray.execution.ray.wait_notice import WaitNotice
from moedisco_ray.stages.context import Context


def never() -> bool:
    return False


def wanted() -> str:
    return "waits for 1 high_mem_gpu"


class Busy(LocalBackend):
    """A backend whose pool has no slot for a while."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self.charged: list[bool] = []

    def call(self, pool: Any, emit: Any, stop: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.charged.append(any(event.type == "workers_held" for event in self.events))
        return super().call(pool, emit, stop, function, *args, **kwargs)


def test_what_waits_inside_the_shell_is_not_charged(tmp_path: Path) -> None:
    events: list[Event] = []
    backend = Busy(events)
    context = Context(small_config(tmp_path), tmp_path, "", events.append, backend)
    assert context.call(HighMemoryPool(), Files(), lambda: [event.type for event in events]) == ["workers_held"]
    assert backend.charged == [False]
    assert [event.type for event in events] == ["workers_held", "workers_released"]
    assert events[0].data["pool"] == "high_memory"


def test_what_holds_no_pool_is_not_metered(tmp_path: Path) -> None:
    events: list[Event] = []
    context = Context(small_config(tmp_path), tmp_path, "", events.append, LocalBackend())
    assert context.call(None, Files(), max, 2, 3) == 3
    assert events == []


def test_a_function_of_a_stopped_run_does_not_begin(tmp_path: Path) -> None:
    stop = StopFile(tmp_path / "stop")
    stop.request("budget")
    context = dataclasses.replace(
        Context(small_config(tmp_path), tmp_path, "", lambda _: None, LocalBackend()), stop=stop
    )
    with pytest.raises(RunStopped, match="budget"):
        context.call(HighMemoryPool(), Files(), pytest.fail)


def test_what_begins_at_once_is_not_worth_a_word() -> None:
    events: list[Event] = []
    wait_for_start(lambda: True, wanted, events.append, NEVER, grace=0.0)
    assert events == []


def test_a_wait_is_told_of_once() -> None:
    events: list[Event] = []
    starts = iter([False] * 5 + [True])
    wait_for_start(lambda: next(starts), wanted, events.append, NEVER, grace=0.0)
    assert [(event.type, event.data) for event in events] == [("warning", {"message": "waits for 1 high_mem_gpu"})]


def test_a_short_wait_is_not() -> None:
    events: list[Event] = []
    starts = iter([False] * 5 + [True])
    wait_for_start(lambda: next(starts), wanted, events.append, NEVER, grace=60.0)
    assert events == []


def test_of_several_kinds_any_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    offers(monkeypatch, {"CPU": 4.0, "t4": 1.0, "l4": 2.0})
    assert (
        session.wait_message([{"t4": 1.0}, {"l4": 1.0}, {"t4": 1.0}], 1, 0) == "waits for 1 t4 or l4: 0 of 3 are free"
    )


def test_a_wait_that_begins_again_is_told_of_again() -> None:
    now, events = [0.0], list[Event]()
    notice = WaitNotice(events.append, lambda: now[0])
    for goes_on in (False, False, True, False, False):
        if goes_on:
            notice.reset()
        else:
            notice.waiting(wanted)
        now[0] += 5.0
    assert [event.data["message"] for event in events] == ["waits for 1 high_mem_gpu"] * 2


def test_a_wait_ends_when_the_run_is_stopped(tmp_path: Path) -> None:
    stop = StopFile(tmp_path / "stop")
    with pytest.raises(RunStopped, match="cancelled"):
        wait_for_start(never, wanted, lambda _: stop.request("cancelled"), stop, grace=0.0)


def offers(monkeypatch: pytest.MonkeyPatch, resources: dict[str, float]) -> None:
    """Give the Ray cluster one node."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "node", "Alive": True, "Resources": resources}])


@pytest.mark.parametrize(
    ("there", "workers", "free", "words"),
    [
        ({"CPU": 4.0, "high_mem_gpu": 3.0}, 1, 0, "waits for 1 high_mem_gpu: 0 of 3 are free"),
        ({"CPU": 4.0, "high_mem_gpu": 3.0}, 2, 1, "waits for 2 high_mem_gpu at once: 1 of 3 are free"),
        ({"CPU": 4.0}, 1, 0, "waits for 1 high_mem_gpu: no node of the Ray cluster offers it now"),
    ],
)
def test_what_is_missing_is_in_words(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, float], workers: int, free: int, words: str
) -> None:
    offers(monkeypatch, there)
    assert session.wait_message([Placement(HighMemoryPool(), 1, 0).bundle], workers, free) == words
