"""Two whole runs, each a process of its own, on a pool that holds the gang of one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_run import begin_at, same_outcome, small_config
from spot_nodes import SpotNodes, spot_nodes

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import EventLog
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


def test_two_runs_on_a_pool_that_holds_one_gang_both_finish(nodes: SpotNodes, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    nodes.reset({"low_mem_gpu": 2, "high_mem_gpu": WORKERS})
    homes = [tmp_path / name for name in ("one", "other")]
    both = [config(home) for home in homes]
    done = pipeline.run(small_config(tmp_path / "done"), backend=LocalBackend())
    for run in both:
        begin_at("submodels", run, done)
    with contextlib.ExitStack() as ending:
        processes = [ending.enter_context(nodes.driver(run, home)) for run, home in zip(both, homes, strict=True)]
        for home, process in zip(homes, processes, strict=True):
            assert process.wait(300) == 0, (home / "output.log").read_text(encoding="utf-8")
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
