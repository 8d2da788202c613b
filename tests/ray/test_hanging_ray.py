"""Trainings whose process is alive and does nothing are ended, and continue elsewhere with the same bits."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import failing_jobs
import pytest
from failing_jobs import HangsOnce, here, make_job
from ray import cloudpickle

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray import hang_watch
from moedisco_ray.execution.ray.backend import train_all

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(400)]

PLACEMENT = Placement(LowMemoryPool(), workers=1, max_failures=3)
STEPS = 200


class Stopper:
    """Stops the process of a training, as a debugger or a frozen machine would, once it has passed a step."""

    def __init__(self, step: int) -> None:
        self.step, self.pid, self.stopped, self.events = step, 0, False, list[Event]()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.type == "unit_started" and not self.pid:
            self.pid = event.data["pid"]
        if event.type == "progress" and event.data["step"] >= self.step and not self.stopped:
            os.kill(self.pid, signal.SIGSTOP)
            self.stopped = True


def restarts(events: list[Event]) -> list[dict[str, object]]:
    return [event.data for event in events if event.type == "worker_restarted"]


def test_a_stopped_process_is_ended_and_its_training_goes_on(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hang_watch, "SILENT_SECONDS", 25.0)
    undisturbed = here(make_job(tmp_path / "undisturbed", STEPS))
    stopper = Stopper(60)
    [trained] = train_all([make_job(tmp_path / "stopped", STEPS)], PLACEMENT, tmp_path / "ray", stopper)
    [restart] = restarts(stopper.events)
    assert restart["kind"] == "died"
    assert "no sign of life" in str(restart["reason"])
    assert trained.result.losses == undisturbed.losses


def test_a_step_that_never_ends_leaves_its_stack_in_the_log(ray_cluster: None, tmp_path: Path) -> None:
    undisturbed = here(make_job(tmp_path / "undisturbed", STEPS))
    job = dataclasses.replace(make_job(tmp_path / "hangs", STEPS, HangsOnce), logs=tmp_path / "logs")
    cloudpickle.register_pickle_by_value(failing_jobs)  # workers cannot import it
    events: list[Event] = []
    [trained] = train_all([job], PLACEMENT, tmp_path / "ray", events.append)
    [restart] = restarts(events)
    assert restart["kind"] == "died"
    assert "no step ended for 1" in str(restart["reason"])
    assert "in step_tokens" in (tmp_path / "logs" / "submodel-0.0.log").read_text()
    assert trained.result.losses == undisturbed.losses
