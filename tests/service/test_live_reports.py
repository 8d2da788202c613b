"""Reports of active runs are built once for all who ask, and a slow one delays no other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from databases import config

from service.api import live_reports
from service.api.live_reports import AT_ONCE, LiveReports
from service.errors import Overloaded


class Slow:
    """Stands in for `report_of`: each report is built when the test lets it, and is the folder's name."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.may_end: dict[str, threading.Event] = {}

    def __call__(self, read: Callable[..., Any], _config: object) -> Any:
        name = Path(read.args[0]).name
        self.begun.append(name)
        self.may_end.setdefault(name, threading.Event()).wait(30)
        return name

    def let(self, *names: str) -> None:
        for name in names:
            self.may_end.setdefault(name, threading.Event()).set()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    made = Slow()
    monkeypatch.setattr(live_reports, "report_of", made)
    monkeypatch.setattr(live_reports, "storage_of", lambda location: location)
    yield made
    made.let(*made.begun)


def get(reports: LiveReports, name: str) -> Any:
    return reports.get(Path("/runs") / name, config())


def until(true: Callable[[], bool]) -> None:
    deadline = threading.Event()
    for _ in range(2000):
        if true():
            return
        deadline.wait(0.01)
    raise AssertionError


def test_a_slow_report_delays_no_other_one_and_is_built_once(slow: Slow, monkeypatch: pytest.MonkeyPatch):
    """Before: one lock for all runs in directories, so the other report had to wait (503 after three seconds)."""
    reports = LiveReports()
    slow.let("fast")
    with ThreadPoolExecutor(3) as readers:
        waiting = [readers.submit(get, reports, "slow") for _ in range(3)]
        until(lambda: slow.begun == ["slow"])
        assert [get(reports, "fast"), get(reports, "fast")] == ["fast", "fast"]
        monkeypatch.setattr(live_reports, "PATIENCE_SECONDS", 0.05)
        with pytest.raises(Overloaded, match="the report of this run takes long"):
            get(reports, "slow")
        slow.let("slow")
        assert [each.result(10) for each in waiting] == ["slow"] * 3
    assert slow.begun == ["slow", "fast"]


def test_few_are_built_at_the_same_time(slow: Slow, monkeypatch: pytest.MonkeyPatch):
    reports = LiveReports()
    with ThreadPoolExecutor(AT_ONCE) as readers:
        waiting = [readers.submit(get, reports, f"slow-{number}") for number in range(AT_ONCE)]
        until(lambda: len(slow.begun) == AT_ONCE)
        with monkeypatch.context() as patch:
            patch.setattr(live_reports, "PATIENCE_SECONDS", 0.05)
            with pytest.raises(Overloaded, match="the reports of other runs take long"):
                get(reports, "another")
        slow.let(*slow.begun, "another")
        assert {each.result(10) for each in waiting} == set(slow.begun)
    assert get(reports, "another") == "another"
