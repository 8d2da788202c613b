"""A seed that several workers train on Ray equals that of one worker up to rounding, also after a worker's death."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import begin_at, small_config
from waiting import until

from moedisco_ray.backend import Backend
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import RunStopped
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.artifacts import read_json, read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import open_checkpoint

# Slow: a whole run and two seeds. A training of several workers without Ray is in tests/unit/test_parallel.py.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]
STEPS, BATCH = 80, 256
OPTIMIZER = {"name": "muon", "batch_tokens": BATCH, "lr": 2e-3, "schedule": "run_cosine", "warmup": 0.02}


def config_at(output: Path, workers: int | tuple[int, int]) -> RunConfig:
    return small_config(
        output,
        tokens={"total": 2 * STEPS * BATCH, "seed_share": 0.5, "finetune_share": 0.1},
        model={
            "config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "moe_intermediate_size": 48,
                "num_experts": 4,
                "num_experts_per_tok": 2,
            }
        },
        submodels={"optimizer": OPTIMIZER, "sync_every": 4},
        finetune={"optimizer": OPTIMIZER},
        pools={"low_memory": {"max_workers": 2, "seed_workers": workers}, "high_memory": {"workers": 1}},
        evaluation={"max_tokens": 3000, "every_tokens": 30 * BATCH},
    )


def seed(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The record of the seed's training, and its weights."""
    manifest, weights = read_manifest(directory / "seed"), open_checkpoint(directory / "seed")
    assert manifest is not None
    [unit] = manifest.summary["units"]
    return unit, {name: weights[name].clone() for name in weights}


def held_out(directory: Path) -> list[float]:
    events = EventLog.read(directory / "events.jsonl")
    return [event.data["held_out_loss"] for event in events if event.type == "evaluation" and event.stage == "seed"]


@pytest.fixture(scope="module")
def together(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(config_at(tmp_path_factory.mktemp("together"), 2))


def train_seed(config: RunConfig, done: Path, backend: Backend | None = None) -> None:
    """Make a run of another one's corpus, which ends after its seed."""
    begin_at("seed", config, done)
    stop = StopFile(config.directory.parent / "stop")

    def end(event: Event) -> None:
        if event.type == "stage_finished" and event.stage == "seed":
            stop.request("cancelled")

    with pytest.raises(RunStopped):
        pipeline.run(config, (end,), backend=backend, stop=stop)


def test_two_workers_train_the_seed_of_one(together: Path, tmp_path: Path) -> None:
    config = config_at(tmp_path, 1)
    train_seed(config, together, LocalBackend())
    alone = config.directory
    (ours, weights), (theirs, expected) = seed(together), seed(alone)
    assert (ours["steps"], ours["tokens"]) == (theirs["steps"], theirs["tokens"]) == (STEPS, STEPS * BATCH)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert held_out(together) == pytest.approx(held_out(alone), rel=1e-4)
    assert len(held_out(together)) == 3
    torch.testing.assert_close(weights, expected, rtol=1e-2, atol=1e-3)


def test_the_sub_models_continue_from_it_and_the_report_counts_its_workers(together: Path) -> None:
    assert read_json(together / "seed" / "optimizer_state" / "steps.json") == {"steps": STEPS}
    assert read_json(together / "submodels" / "0" / "optimizer_state" / "steps.json")["steps"] > STEPS
    stages = {stage["name"]: stage for stage in read_json(together / "report.json")["stages"]}
    assert stages["seed"]["workers"] == 2
    assert stages["seed"]["worker_seconds"] > 0
    unit, _ = seed(together)
    assert unit["workers"] == 2


def test_a_seed_that_lost_a_worker_ends_with_the_same_bits(together: Path, tmp_path: Path) -> None:
    config = config_at(tmp_path, 2)
    log = config.directory / "events.jsonl"

    def seen(kind: str) -> list[Event]:
        return (
            [event for event in EventLog.read(log) if event.type == kind and event.stage == "seed"]
            if log.exists()
            else []
        )

    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(train_seed, config, together)
        until(lambda: run.done() or any(event.data["step"] > 12 for event in seen("progress")), 200)
        os.kill(seen("unit_started")[-1].data["pid"], signal.SIGKILL)
        run.result(300)
    assert [event.data["kind"] for event in seen("worker_restarted")] == ["died"]
    (_, weights), (_, expected) = seed(config.directory), seed(together)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
