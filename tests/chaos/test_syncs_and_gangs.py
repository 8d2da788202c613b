"""What happens to sub-models that sync, and to a gang, when a node of theirs goes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from failing_jobs import make_job
from spot_nodes import SpotNodes
from waiting import until

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import HighMemoryPool, LowMemoryPool, Outer
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.ray.backend import train_all, train_gang
from moedisco_ray.training import SyncPlan, TrainJob

LOW, HIGH = LowMemoryPool(), HighMemoryPool(workers=2)
STEPS, AT = 4000, (1000, 2000, 3000)
NAMES = ["submodel-0", "submodel-1"]
PATIENCE = 30.0
"""Seconds that the one waits for the other; several times what the other's new start takes."""
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


def members(directory: Path, patience: float | None) -> list[TrainJob]:
    sync = SyncPlan(directory / "sync", AT, Outer(), patience, ranges=2)
    return [
        dataclasses.replace(
            make_job(directory / name, STEPS), name=name, seed=seed, checkpoint_every=200, log_every=10, sync=sync
        )
        for seed, name in enumerate(NAMES)
    ]


@contextlib.contextmanager
def beside(train: Callable[[Emit], list[Trained]]) -> Iterator[tuple[list[Event], Future[list[Trained]]]]:
    """A training that runs in parallel with the block, and its events."""
    events: list[Event] = []
    with ThreadPoolExecutor(1) as thread:
        yield events, thread.submit(train, events.append)


def of(events: list[Event], kind: str, unit: str | None = None) -> list[Event]:
    return [event for event in events if event.type == kind and unit in (None, event.unit)]


def test_a_member_whose_node_dies_is_waited_for_and_nobody_learns_anything_else(
    nodes: SpotNodes, tmp_path: Path
) -> None:
    nodes.reset({LOW.resource: 2, HIGH.resource: 0})
    there, here = members(tmp_path / "there", None), members(tmp_path / "here", None)
    with beside(lambda emit: train_all(there, Placement(LOW, 1, 0), tmp_path / "ray", emit)) as (events, training):
        until(lambda: of(events, "sync"), 90)
        nodes.kill(of(events, "unit_started", NAMES[0])[-1].data["node_id"])
        nodes.add(LOW.resource)
        trained = training.result(180)
    LocalBackend().train_all(here, Placement(LOW, 1, 0), tmp_path, lambda _: None)
    assert [event.data["members"] for event in of(events, "sync")] == [NAMES] * len(AT)
    assert {event.data["kind"] for event in of(events, "worker_restarted")} == {"preempted"}
    assert all(each.result.finished for each in trained)
    for ours, theirs in zip(there, here, strict=True):
        assert (ours.output / "model.safetensors").read_bytes() == (theirs.output / "model.safetensors").read_bytes()
    nodes.check_nothing_is_left()


def test_a_member_that_is_away_is_late_for_one_sync_and_joins_the_next(nodes: SpotNodes, tmp_path: Path) -> None:
    nodes.reset({LOW.resource: 2, HIGH.resource: 0})
    jobs = members(tmp_path, PATIENCE)
    with beside(lambda emit: train_all(jobs, Placement(LOW, 1, 0), tmp_path / "ray", emit)) as (events, training):
        until(lambda: of(events, "progress", NAMES[0]), 60)
        nodes.kill(of(events, "unit_started", NAMES[0])[-1].data["node_id"])
        until(lambda: of(events, "sync"), 3 * PATIENCE)
        nodes.add(LOW.resource)
        trained = training.result(180)
    assert [(event.data["members"], event.data["late"]) for event in of(events, "sync")] == [
        (NAMES[1:], NAMES[:1]),
        (NAMES, []),
        (NAMES, []),
    ]
    assert [each.result.steps for each in trained] == [STEPS, STEPS]
    nodes.check_nothing_is_left()


def test_a_notice_to_one_worker_of_a_gang_has_all_of_it_save_and_go_on(nodes: SpotNodes, tmp_path: Path) -> None:
    nodes.reset({LOW.resource: 0, HIGH.resource: 3})
    job, undisturbed = (
        dataclasses.replace(make_job(tmp_path / name, 400), stage="finetune", name="finetune", checkpoint_every=4000)
        for name in ("job", "undisturbed")
    )
    with beside(lambda emit: [train_gang(job, HIGH, 0, tmp_path / "ray", emit)]) as (events, training):
        until(lambda: [event for event in of(events, "progress") if event.data["step"] >= 50], 90)
        nodes.notify(of(events, "unit_started")[0].data["node_id"], seconds=60)
        [trained] = training.result(180)
    [restart] = of(events, "worker_restarted")
    assert restart.data["kind"] == "preempted"
    before = [event.data["step"] for event in of(events, "progress") if event.time < restart.time]
    assert trained.result.restored_step == before[-1] >= 50
    nodes.check_nothing_is_left()
    nodes.reset({LOW.resource: 0, HIGH.resource: 2})
    assert train_gang(undisturbed, HIGH, 0, tmp_path / "again", lambda _: None).result.losses == trained.result.losses
