"""Sub-models on one seat whose process is killed at seeded moments; checkpoints on a disk or a faulty object store.

What they learn is the same, bit for bit, and no kill costs more than `check_losses` allows. CHAOS_SEEDS is the number
of seeds.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing_jobs import here, make_job
from faulty_s3 import FaultyS3, faulty_s3, seeded
from s3_standin import s3_server
from seat_kills import SeatKiller, draw
from spot_nodes import SpotNodes, spot_nodes
from step_account import attempts, check_losses

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool
from moedisco_ray.core.store.locations import Location
from moedisco_ray.execution.ray.backend import train_all
from moedisco_ray.execution.ray.seats import Seats
from moedisco_ray.training import TrainJob, TrainResult

SEEDS = int(os.environ.get("CHAOS_SEEDS", "30"))
UNITS, STEPS, INTERVAL = 3, 400, 100
FAULTY_SHARE = 0.05
LOW = LowMemoryPool()
_log = logging.getLogger(__name__)
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def store() -> Iterator[tuple[FaultyS3, str]]:
    with s3_server("seats") as server, faulty_s3(server) as (proxy, address):
        yield proxy, f"endpoint_override={address}&scheme=http"


@pytest.fixture(scope="module")
def nodes(store: tuple[FaultyS3, str]) -> Iterator[SpotNodes]:
    """Started after the object store: the workers need its address and keys in their environment."""
    with spot_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[TrainResult]:
    return [here(job(tmp_path_factory.mktemp("undisturbed"), unit, None)) for unit in range(UNITS)]


def job(directory: Path, unit: int, checkpoints: Location | None) -> TrainJob:
    made = make_job(directory, STEPS)
    return dataclasses.replace(
        made, name=f"submodel-{unit}", seed=unit, checkpoint_every=INTERVAL, checkpoints=checkpoints or made.checkpoints
    )


def is_saving(checkpoints: Location) -> bool:
    """Whether a checkpoint on a disk is being written, or any moment is as good, in an object store."""
    return isinstance(checkpoints, str) or any(checkpoints.glob(".step-*.draft"))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_seat_that_is_killed_costs_an_interval_at_most(
    nodes: SpotNodes,
    store: tuple[FaultyS3, str],
    undisturbed: list[TrainResult],
    tmp_path: Path,
    seed: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, __name__)
    nodes.reset({LOW.resource: 1})
    kind, plan = draw(seed, UNITS, STEPS)
    if kind != "disk":
        store[0].faults = seeded([kind], 1.0 if kind == "slow" else FAULTY_SHARE, seed)
    places = [None if kind == "disk" else f"s3://seats/{seed}-{unit}?{store[1]}" for unit in range(UNITS)]
    jobs = [job(tmp_path / f"{unit}", unit, place) for unit, place in enumerate(places)]
    by_name = {each.name: each for each in jobs}
    kills = {each.name: kill for each, kill in zip(jobs, plan, strict=True) if kill is not None}
    killer = SeatKiller(dict(kills), lambda unit: is_saving(by_name[unit].checkpoints))
    began = time.monotonic()
    trained = []
    with Seats("run") as seats:
        for each in jobs:
            if each.name in kills and kills[each.name].moment == "idle":
                killer.kill(each.name)
            trained += train_all(
                [each], Placement(LOW, 1, max_failures=UNITS), tmp_path / f"ray-{each.name}", killer, seats=seats
            )
    _log.info("seed %d, %s, %.1f s: %s", seed, kind, time.monotonic() - began, "; ".join(map(str, plan)))
    assert [each.result.losses for each in trained] == [each.losses for each in undisturbed]
    check_work(killer, {name for name, kill in kills.items() if kill.moment == "idle"}, on_disk=kind == "disk")
    nodes.check_nothing_is_left()


def check_work(killer: SeatKiller, idle: set[str], *, on_disk: bool) -> None:
    """A kill of a seat at work is one failure, of an idle seat none, and no more steps are lost than they may be.

    The driver hears of a step late: a kill may hit the training that follows the one that it was meant for.
    """
    restarts = [event for event in killer.events if event.type == "worker_restarted"]
    assert {event.data["kind"] for event in restarts} <= {"died"}
    assert len(restarts) <= len(set(killer.done) - idle)
    for unit in attempts(killer.events).values():
        assert unit[-1].end == STEPS
        assert all(attempt.in_a_row for attempt in unit)
        check_losses(unit, INTERVAL, on_disk=on_disk)
