"""Two whole runs, each a process of its own, on a pool that holds the gang of one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from small_run import begin_at, same_outcome, small_config
from spot_nodes import SpotNodes, spot_nodes

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.events import EventLog
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

WORKERS = 2
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


@pytest.fixture
def nodes() -> Iterator[SpotNodes]:
    with spot_nodes() as nodes:
        yield nodes


def config(output: Path) -> RunConfig:
    return small_config(output, pools={"high_memory": {"workers": WORKERS}})


def start(run: RunConfig, nodes: SpotNodes) -> subprocess.Popen[bytes]:
    path = run.output / "run.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json")), encoding="utf-8")
    with (run.output / "output.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "moedisco_ray", "run", str(path)], stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_ADDRESS": nodes.address, "RAY_AUTH_MODE": "disabled"})


def test_two_runs_on_a_pool_that_holds_one_gang_both_finish(nodes: SpotNodes, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    nodes.reset({"low_mem_gpu": 2, "high_mem_gpu": WORKERS})
    done = pipeline.run(small_config(tmp_path / "done"), backend=LocalBackend())
    both = [config(tmp_path / name) for name in ("one", "other")]
    for run in both:
        begin_at("submodels", run, done)
    processes = [start(run, nodes) for run in both]
    try:
        for run, process in zip(both, processes, strict=True):
            assert process.wait(300) == 0, (run.output / "output.log").read_text(encoding="utf-8")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    one, other = (run.directory for run in both)
    same_outcome(one, other)
    times = [trained(run.directory) for run in both]
    (_, first_ends), (second_begins, _) = sorted(times)
    assert first_ends < second_begins, "their gangs would not have fitted beside each other"
    nodes.check_nothing_is_left()


def trained(directory: Path) -> tuple[float, float]:
    """When the gang's first worker and its last step were heard of."""
    events = [event for event in EventLog.read(directory / "events.jsonl") if event.unit == "finetune"]
    began, *restarts = [event for event in events if event.type == "unit_started"]
    assert not restarts
    assert began.data["workers"] == WORKERS
    return began.time, next(event.time for event in events if event.type == "unit_finished")
