"""A driver is killed while its seats train: with the next one, the run takes hardly longer."""

from __future__ import annotations

from pathlib import Path

import next_driver
import pytest
from failing_jobs import here
from next_driver import driver, write_jobs
from spot_nodes import spot_nodes
from waiting import until

from moedisco_ray.core.records.events import Event

UNITS, STEPS = 4, 3000
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]


def test_a_killed_driver_costs_no_step_and_little_time(tmp_path: Path) -> None:
    """Two runs at the same time, since other programs on this machine slow both down; the driver of one is killed."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for run in (undisturbed, killed):
        jobs = write_jobs(run, UNITS, STEPS, log_every=STEPS // 100)
    with spot_nodes() as nodes:
        for _ in range(2 * UNITS):
            nodes.add("low_mem_gpu")
        with driver(nodes.address, undisturbed) as other, driver(nodes.address, killed) as first:
            until(lambda: is_halfway(killed), 900)
            first.kill()
            first.wait()
            with driver(nodes.address, killed) as second:
                assert second.wait(900) == 0, (killed / "output.log").read_text(encoding="utf-8")
            assert other.wait(900) == 0, (undisturbed / "output.log").read_text(encoding="utf-8")
        nodes.check_nothing_is_left()
    events = next_driver.events(killed)
    started = [event.unit for event in events if event.type == "unit_started" and event.unit is not None]
    assert sorted(started) == [job.name for job in jobs]
    assert next_driver.losses(killed) == next_driver.losses(undisturbed)
    assert next_driver.losses(killed)[0] == list(here(write_jobs(tmp_path / "here", 1, STEPS)[0]).losses)
    assert makespan(events) <= 1.1 * makespan(next_driver.events(undisturbed))


def makespan(events: list[Event]) -> float:
    """Seconds from the start of the first training to the end of the last one."""
    began = min(event.time for event in events if event.type == "unit_started")
    ended = max(event.time for event in events if event.type == "unit_finished")
    return ended - began


def is_halfway(directory: Path) -> bool:
    steps = {event.unit: event.data["step"] for event in next_driver.events(directory) if event.type == "progress"}
    return len(steps) == UNITS and sum(steps.values()) >= UNITS * STEPS / 2
