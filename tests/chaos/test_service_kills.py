"""One run with twenty kills of the service and of its drivers at seeded moments ends like the undisturbed run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from disturbed_run import Killer
from kill_plan import draw
from real_service import RealService, real_service
from small_run import same_outcome, small_config
from watched_run import Watcher

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from service.client import Client

KILLS = 20
_log = logging.getLogger(__name__)
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RealService]:
    with real_service(tmp_path) as running:
        yield running


@pytest.mark.parametrize("seed", [17])
def test_a_run_survives_twenty_kills(
    service: RealService, tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, __name__)
    undisturbed = pipeline.run(long_config(tmp_path / "undisturbed"), backend=LocalBackend())
    plan = draw(seed, KILLS)
    with service.client() as client:
        run = client.submit(long_config(tmp_path / "ignored").model_copy(update={"output": Path("runs")}))
        watcher = Watcher(client, run.id)
        killer = Killer(service, watcher, run.id)
        began = time.monotonic()
        for number, kill in enumerate(plan, 1):
            killer.carry_out(kill)
            _log.info("%.1f s: %d. %s", time.monotonic() - began, number, kill)
        service.wait_until_listening()
        seen = watcher.join()
        _log.info("%.1f s: the run has ended", time.monotonic() - began)
        finished = client.run(run.id)
        assert finished.state == "succeeded", (finished.reason, service.output.read_text())
        assert finished.attempt == 1 + sum(kill.target == "driver" for kill in plan)
        assert [position for position, _ in seen] == list(range(finished.events))
        same_outcome(next((service.home / "runs").glob(f"{run.id}/small")), undisturbed)
        same_curves(client, run.id, [event for _, event in seen])


def long_config(output: Path) -> RunConfig:
    """Enough steps and checkpoints that every driver gets somewhere before it is killed."""
    return small_config(output, tokens={"total": 2_400_000, "finetune_share": 0.4}, checkpoint={"every": 5})


def same_curves(client: Client, run_id: str, events: list[Event]) -> None:
    """The service's curves hold each step once: what the last driver to train it said."""
    for series in client.metrics(run_id, points=10_000).series:
        mine = [event.data for event in events if event.type == "progress" and event.unit == series.unit]
        told = {data["step"]: data["loss"] for data in mine}
        assert dict(zip(series.step, series.value, strict=True)) == told
