"""Workers and the pipeline are killed at seeded steps; what comes out must be the undisturbed run's, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from small_run import begin_at, same_outcome, small_config

from moedisco_ray.core.records.events import Event
from moedisco_ray.execution import pipeline

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


class Killer:
    """Kills the worker of a unit once it has passed a step."""

    def __init__(self, unit: str, step: int) -> None:
        self.unit, self.step, self.pid, self.killed = unit, step, 0, False

    def __call__(self, event: Event) -> None:
        if event.unit != self.unit or self.killed:
            return
        if event.type == "unit_started":
            self.pid = event.data["pid"]
        if event.type == "progress" and event.data["step"] >= self.step:
            os.kill(self.pid, signal.SIGKILL)
            self.killed = True


@pytest.mark.slow
def test_killed_workers_go_on_from_their_checkpoints(ray_cluster: None, undisturbed: Path, tmp_path: Path) -> None:
    """One of the sub-models, and then that of the fine-tune."""
    killers = [Killer(unit, random.Random(unit).randrange(12, 20)) for unit in ("submodel-1", "finetune")]
    events: list[Event] = []
    config = small_config(tmp_path)
    begin_at("submodels", config, undisturbed)
    directory = pipeline.run(config, (*killers, events.append))
    assert all(killer.killed for killer in killers)
    assert [(event.unit, event.data["kind"]) for event in events if event.type == "worker_restarted"] == [
        (killer.unit, "died") for killer in killers
    ]
    ends = {event.unit: event.data for event in events if event.type == "unit_finished"}
    for killer in killers:  # none began anew, or lost more than the steps since its last checkpoint
        assert killer.step - 10 < ends[killer.unit]["restored_step"] < ends[killer.unit]["steps"]
    same_outcome(directory, undisturbed)


@pytest.mark.chaos  # the service's end-to-end test kills a driver in CI
def test_a_killed_pipeline_goes_on_where_it_was(undisturbed: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    step = random.Random(3).randrange(15, 40)
    with started(path) as running:
        for event in read_events(running):
            if event.type == "progress" and event.stage == "submodels" and event.data["step"] >= step:
                unit = event.unit
                running.send_signal(signal.SIGKILL)
                break
    assert (config.directory / "clusters" / "manifest.json").exists()
    assert not (config.directory / "submodels").exists()
    with started(path) as running:
        events = list(read_events(running))
        assert running.wait(timeout=60) == 0
    assert {event.stage for event in events if event.type == "stage_skipped"} == {
        "corpus",
        "seed",
        "cluster",
        "decompose",
    }
    first = next(event.data["step"] for event in events if event.type == "progress" and event.unit == unit)
    assert first > 10
    same_outcome(config.directory, undisturbed)


@pytest.mark.slow  # it starts a Ray of its own; the tests of stopping do the same in one process
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(ray_cluster: None, undisturbed: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path, checkpoint={"every": 100_000})
    begin_at("finetune", config, undisturbed)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    with started(path) as running:
        for event in read_events(running):
            if event.type == "progress" and event.stage == "finetune":  # at once: all its steps take seconds
                running.send_signal(signal.SIGINT)
                break
        _, message = running.communicate(timeout=90)
        assert running.returncode == 130
    assert "same command" in message
    assert "Traceback" not in message
    [saved] = (config.directory / "checkpoints").glob("finetune-*/*-finetune/steps/step-*")
    events: list[Event] = []
    pipeline.run(config, (events.append,))
    assert next(event.data["step"] for event in events if event.type == "progress") == int(saved.name.split("-")[1]) + 1
    same_outcome(config.directory, undisturbed)


def started(path: Path) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-m", "moedisco_ray", "run", str(path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "RAY_AUTH_MODE": "disabled"},
    )


def read_events(running: subprocess.Popen[str]) -> Iterator[Event]:
    assert running.stdout is not None
    for line in running.stdout:
        yield Event(**json.loads(line))
