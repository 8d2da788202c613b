"""Trainings whose process is alive and does nothing are ended, and continue elsewhere with the same bits."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from pathlib import Path

import failing_jobs
import pytest
from failing_jobs import HUNG_SECONDS, HangsOnce, here, make_job
from ray import cloudpickle

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray import hang_watch
from moedisco_ray.execution.ray.backend import train_all
from moedisco_ray.execution.ray.pulse import BEAT_SECONDS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

PLACEMENT = Placement(LowMemoryPool(), workers=1, max_failures=3)
STEPS = 200
HANGS = "submodel-1"


class Stopper:
    """Stops the process of a training, as a debugger or a frozen machine would, once it has passed a step."""

    def __init__(self, unit: str, step: int) -> None:
        self.unit, self.step, self.pid, self.stopped, self.events = unit, step, 0, False, list[Event]()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.unit != self.unit:
            return
        if event.type == "unit_started" and not self.pid:
            self.pid = event.data["pid"]
        if event.type == "progress" and event.data["step"] >= self.step and not self.stopped:
            os.kill(self.pid, signal.SIGSTOP)
            self.stopped = True


def test_a_stopped_process_and_a_step_that_never_ends_are_ended_and_their_trainings_go_on(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both at once, on the two slots. The step leaves its stack in the log."""
    monkeypatch.setattr(hang_watch, "SILENT_SECONDS", 25.0)
    cloudpickle.register_pickle_by_value(failing_jobs)  # workers cannot import it
    undisturbed = here(make_job(tmp_path / "undisturbed", STEPS))
    hangs = dataclasses.replace(make_job(tmp_path / "hangs", STEPS, HangsOnce), name=HANGS, logs=tmp_path / "logs")
    stopped = make_job(tmp_path / "stopped", STEPS)
    stopper = Stopper(stopped.name, 60)
    trained = train_all([stopped, hangs], PLACEMENT, tmp_path / "ray", stopper)
    assert [each.result.losses for each in trained] == [undisturbed.losses] * 2
    restarts = [(event.unit, event.data) for event in stopper.events if event.type == "worker_restarted"]
    # one each: a training that starts again and again would end with the same losses
    assert sorted((unit, data["kind"]) for unit, data in restarts) == [(stopped.name, "died"), (HANGS, "died")]
    reasons = {unit: data["reason"] for unit, data in restarts}
    assert "no sign of life" in reasons[stopped.name]
    found = re.search(r"no step ended for (\d+) s", reasons[HANGS])
    assert found is not None
    assert HUNG_SECONDS <= int(found[1]) <= HUNG_SECONDS + 2 * BEAT_SECONDS
    assert "in step_tokens" in (tmp_path / "logs" / f"{HANGS}.0.log").read_text()
