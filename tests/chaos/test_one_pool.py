"""Trainings when a node is announced to leave, when there is no node, and when nodes are fewer than trainings."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from failing_jobs import here, make_job
from ray.util import list_named_actors, placement_group_table
from spot_nodes import SpotNodes
from waiting import until

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import LowMemoryPool
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray.backend import train_all
from moedisco_ray.training import TrainJob

POOL = LowMemoryPool()
STEPS = 5000
"""Of seconds altogether: what happens to a training must find it under way."""
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


@dataclasses.dataclass(frozen=True)
class Running:
    """Trainings that run in parallel with the test."""

    events: list[Event]
    trained: Future[list[Trained]]

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.type == kind]

    def reached(self, step: int) -> bool:
        return any(event.data["step"] >= step for event in self.of("progress"))


@contextlib.contextmanager
def running(jobs: Sequence[TrainJob], directory: Path) -> Iterator[Running]:
    """Without any patience for failures."""
    events: list[Event] = []
    with ThreadPoolExecutor(1) as thread:
        yield Running(
            events, thread.submit(train_all, jobs, Placement(POOL, 1, max_failures=0), directory, events.append)
        )


def test_a_notice_is_followed_by_a_checkpoint_and_by_another_node(nodes: SpotNodes, tmp_path: Path) -> None:
    nodes.reset({POOL.resource: 2})
    job, undisturbed = (
        dataclasses.replace(make_job(tmp_path / name, STEPS), checkpoint_every=10 * STEPS)
        for name in ("job", "undisturbed")
    )
    with running([job], tmp_path / "ray") as run:
        until(lambda: run.reached(50), 60)
        nodes.notify(run.of("unit_started")[0].data["node_id"], seconds=60)
        [trained] = run.trained.result(120)
    first, second = run.of("unit_started")
    assert first.data["node_id"] != second.data["node_id"]
    [restart] = run.of("worker_restarted")
    assert restart.data["kind"] == "preempted"
    before = [event.data["step"] for event in run.of("progress") if event.time < restart.time]
    assert trained.result.restored_step == before[-1] > 50
    assert trained.result.losses == here(undisturbed).losses
    nodes.check_nothing_is_left()


def test_an_empty_pool_is_waited_for_and_said_to_be_empty(nodes: SpotNodes, tmp_path: Path) -> None:
    nodes.reset({POOL.resource: 0})
    with running([make_job(tmp_path / "job", 20)], tmp_path / "ray") as run:
        [warning] = until(lambda: run.of("warning"))
        assert POOL.resource in warning.data["message"]
        assert not run.of("unit_started")
        assert not groups()
        nodes.add(POOL.resource)
        [trained] = run.trained.result(120)
    assert trained.result.finished
    assert len(run.of("warning")) == 1


def test_what_waits_holds_nothing(nodes: SpotNodes, tmp_path: Path) -> None:
    nodes.reset({POOL.resource: 1})
    names = ["one", "another", "a third"]
    jobs = [dataclasses.replace(make_job(tmp_path / name, 20), name=name.replace(" ", "-")) for name in names]
    most = 0
    with running(jobs, tmp_path / "ray") as run:
        while not run.trained.done():
            most = max(most, len(seats()))
            assert not groups()
    assert len(run.trained.result()) == len(names)
    assert most == 1
    assert [event.type for event in run.events if event.type in ("unit_started", "unit_finished")] == [
        "unit_started",
        "unit_finished",
    ] * len(names)
    nodes.check_nothing_is_left()


def seats() -> list[str]:
    """Names of seats that hold or await a slot."""
    return [name for name in list_named_actors() if name.startswith("run-low_memory-")]


def groups() -> list[str]:
    """Placement groups that hold or await resources."""
    return [key for key, group in placement_group_table().items() if group["state"] != "REMOVED"]
