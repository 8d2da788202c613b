"""A driver that is killed leaves its seats to the next one."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections import defaultdict
from pathlib import Path

import next_driver
import pytest
import ray
import torch
from failing_jobs import here
from next_driver import driver, store_jobs, write_jobs
from ray.util import list_named_actors
from waiting import until

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool, Outer
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.ray.named_actors import mailbox_name
from moedisco_ray.training import SyncPlan, TrainJob
from moedisco_ray.training.checkpoints import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

UNITS, STEPS = 2, 1500


def steps_made(events: list[Event]) -> dict[str, list[int]]:
    """The steps that each training reported, in the order of its reports."""
    found = defaultdict(list)
    for event in events:
        if event.type == "progress" and event.unit is not None:
            found[event.unit].append(event.data["step"])
    return found


@pytest.mark.parametrize("dies", [True, pytest.param(False, marks=pytest.mark.chaos)])
def test_the_next_driver_loses_no_step_of_a_running_seat(two_slots: str, tmp_path: Path, dies: bool) -> None:
    """A driver that does not die, but was taken for dead, ends by itself and leaves the seats alone.

    Before: the seats ended with their driver, and the next one made the steps since their checkpoints again.
    """
    jobs = write_jobs(tmp_path, UNITS, STEPS)
    with driver(two_slots, tmp_path) as first:
        until(lambda: len(steps_made(next_driver.events(tmp_path))) == UNITS, 90)
        if dies:
            first.kill()
            first.wait()
        killed = next_driver.events(tmp_path)
        assert all(steps[-1] < STEPS for steps in steps_made(killed).values())
        with driver(two_slots, tmp_path) as second:
            assert second.wait(120) == 0, (tmp_path / "output.log").read_text(encoding="utf-8")
        assert first.wait(30) != 0
        assert dies or "another driver has taken over the run" in (tmp_path / "output.log").read_text(encoding="utf-8")
    events = next_driver.events(tmp_path)
    made = steps_made(events)
    assert {unit: {*steps} for unit, steps in made.items()} == {job.name: {*range(1, STEPS + 1)} for job in jobs}
    assert len([event for event in events if event.type == "unit_started"]) == UNITS
    alone = here(write_jobs(tmp_path / "here", UNITS, STEPS)[-1])
    assert next_driver.losses(tmp_path)[-1] == list(alone.losses)
    assert list_named_actors(all_namespaces=True) == []
    if dies:  # else both may have stored the same event
        assert all(len(steps) == STEPS for steps in made.values())
        check_bill(killed, events)


def test_no_seat_outlives_both_its_driver_and_its_mailbox(two_slots: str, tmp_path: Path) -> None:
    """They die with the machine of the driver. A seat that trains saves a checkpoint, and leaves its slot.

    Before: it trained to its end, and then kept its slot until the Ray cluster was ended.
    """
    [job] = write_jobs(tmp_path, 1, 100_000)
    with driver(two_slots, tmp_path) as first:
        until(lambda: steps_made(next_driver.events(tmp_path)), 90)
        first.kill()
        first.wait()
    [mailbox] = [each for each in list_named_actors(all_namespaces=True) if each["name"].endswith(mailbox_name(""))]
    ray.kill(ray.get_actor(**mailbox))
    until(lambda: list_named_actors(all_namespaces=True) == [], 120)
    [made] = steps_made(next_driver.events(tmp_path)).values()
    assert (checkpoint.latest(job.checkpoints) or 0) >= made[-1]


def test_a_driver_that_starts_while_members_wait_at_a_sync_completes_it(two_slots: str, tmp_path: Path) -> None:
    """One waits, and the other is stopped on its way; none starts again, and the bits are those of one process."""
    torch.set_num_threads(1)
    synced = synced_jobs(tmp_path)
    store_jobs(tmp_path, synced)
    members = tmp_path / "sync" / "sync-0001" / "members"
    with driver(two_slots, tmp_path) as first:
        late = until(lambda: process_of("submodel-1", tmp_path), 120)
        os.kill(late, signal.SIGSTOP)
        until((members / "submodel-0.json").exists, 90)
        first.kill()
        first.wait()
    with driver(two_slots, tmp_path) as second:
        until(lambda: [event.type for event in next_driver.events(tmp_path)].count("run_started") == 2, 60)
        assert not (members / "submodel-1.json").exists()
        os.kill(late, signal.SIGCONT)
        assert second.wait(120) == 0, (tmp_path / "output.log").read_text(encoding="utf-8")
    events = next_driver.events(tmp_path)
    assert [event.data["members"] for event in events if event.type == "sync"] == [[job.name for job in synced]]
    assert sorted(event.unit or "" for event in events if event.type == "unit_started") == [job.name for job in synced]
    alone = synced_jobs(tmp_path / "here")
    LocalBackend().train_all(alone, Placement(LowMemoryPool(max_workers=2), 1, 0), tmp_path / "local", lambda _: None)
    for ours, theirs in zip(synced, alone, strict=True):
        assert (ours.output / "model.safetensors").read_bytes() == (theirs.output / "model.safetensors").read_bytes()


def synced_jobs(directory: Path) -> list[TrainJob]:
    """Two trainings with a sync; the second one has far more steps before it."""
    return [
        dataclasses.replace(job, steps=steps, sync=SyncPlan(directory / "sync", (steps - 10,), Outer(), ranges=2))
        for job, steps in zip(write_jobs(directory, 2, 800), (20, 800), strict=True)
    ]


def process_of(unit: str, directory: Path) -> int | None:
    """The process in which a training has begun."""
    started = [each for each in next_driver.events(directory) if each.type == "unit_started" and each.unit == unit]
    return started[0].data["pid"] if started else None


def check_bill(killed: list[Event], events: list[Event]) -> None:
    """The seats are also paid for while no driver lives."""
    meter = Meter()
    for event in events:
        meter.update(event)
    begun = [event for event in killed if event.type == "workers_held"]
    ended = [event for event in events if event.type == "workers_released"]
    paid = sum(event.time for event in ended) - sum(event.time for event in begun)
    assert meter.worker_seconds["low_memory"] == pytest.approx(paid, abs=1.0)
