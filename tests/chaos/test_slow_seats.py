"""A seat whose process gets a tenth of its time: the training continues on a free slot, soon and with the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing_jobs import here, make_job
from spot_nodes import SpotNodes, spot_nodes

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import LowMemoryPool
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray.backend import train_all
from moedisco_ray.training import TrainJob

LOW = LowMemoryPool()
UNITS, STEPS = 2, 15000
RUNS, STANDS = 0.1, 0.9
"""Seconds for which the slow process runs, and stands still, in turn."""
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[SpotNodes]:
    with spot_nodes() as nodes:
        yield nodes


class Brake:
    """A listener that slows the first process of a training down once it has made a step."""

    def __init__(self, unit: str | None) -> None:
        self.unit, self.pid, self.events = unit, 0, list[Event]()
        self._thread = threading.Thread(target=self._slow_down, daemon=True)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.unit != self.unit:
            return
        if event.type == "unit_started" and not self.pid:
            self.pid = event.data["pid"]
        if event.type == "progress" and not self._thread.ident:
            self._thread.start()

    def _slow_down(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(self.pid, signal.SIGSTOP)
                time.sleep(STANDS)
                os.kill(self.pid, signal.SIGCONT)
                time.sleep(RUNS)


def jobs(directory: Path) -> list[TrainJob]:
    return [
        dataclasses.replace(
            make_job(directory / f"{unit}", STEPS),
            name=f"submodel-{unit}",
            seed=unit,
            checkpoint_every=None,
            log_every=STEPS // 100,
        )
        for unit in range(UNITS)
    ]


def timed(directory: Path, brake: Brake) -> tuple[list[Trained], float]:
    began = time.monotonic()
    trained = train_all(jobs(directory / "jobs"), Placement(LOW, 1, 0), directory / "ray", brake)
    return trained, time.monotonic() - began


def test_a_training_on_a_slow_machine_moves_to_a_free_one(nodes: SpotNodes, tmp_path: Path) -> None:
    nodes.reset({LOW.resource: UNITS + 1})
    _, undisturbed = timed(tmp_path / "undisturbed", Brake(None))
    brake = Brake("submodel-0")
    trained, disturbed = timed(tmp_path / "slow", brake)
    restarts = [(event.unit, event.data["kind"]) for event in brake.events if event.type == "worker_restarted"]
    assert restarts == [("submodel-0", "moved")]
    first, second = (
        event.data["node_id"] for event in brake.events if event.type == "unit_started" and event.unit == "submodel-0"
    )
    assert first != second
    assert trained[0].result.losses == here(jobs(tmp_path / "here")[0]).losses
    assert disturbed <= 1.3 * undisturbed, f"{disturbed:.0f} s, undisturbed {undisturbed:.0f} s"
