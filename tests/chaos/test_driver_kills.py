"""Runs whose driver or whose Ray head is killed at a seeded moment, in a directory or on a faulty S3 server.

The same command, run again, gives the undisturbed run's result, bit for bit. CHAOS_SEEDS is the number of seeds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from driver_plan import Kill, Stage, draw
from faulty_s3 import FaultyS3, faulty_s3, seeded
from s3_standin import s3_server
from small_run import begin_at, same_outcome, small_config, units
from spot_nodes import SpotNodes, spot_nodes
from step_account import attempts, check_losses
from waiting import until

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import commit, read_manifest
from moedisco_ray.core.store.lease import is_leased
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

SEEDS = int(os.environ.get("CHAOS_SEEDS", "30"))
INTERVAL = 8
SLOTS = 2
FAULTY_SHARE = 0.05
END_SECONDS = 150.0
"""Maximum time in which a driver ends after its head is gone (s): Ray tries to reach the head for 60 s."""
WAIT_SECONDS = 400.0
"""Maximum time in which a run gets to the kill, or from there to its end (s): several times what it takes on a busy
machine."""
_log = logging.getLogger(__name__)
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def store() -> Iterator[tuple[FaultyS3, str]]:
    with s3_server("runs") as server, faulty_s3(server) as (proxy, address):
        yield proxy, f"endpoint_override={address}&scheme=http"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return pipeline.run(config(tmp_path_factory.mktemp("undisturbed")), backend=LocalBackend())


def config(output: Path | str) -> RunConfig:
    """The default's phases, with every step reported.

    They are a seed, two sub-models with routers that sync, and a fine-tune on one worker.
    """
    optimizer = {"name": "muon", "batch_tokens": 1024, "lr": 2e-3, "schedule": "run_cosine", "warmup": 0.02}
    return small_config(
        output,
        tokens={"total": 200_000, "seed_share": 0.2, "finetune_share": 0.4},
        submodels={"sync_every": 20, "optimizer": optimizer},
        finetune={"optimizer": optimizer},
        model={
            "config": {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "moe_intermediate_size": 64,
                "num_experts": 4,
                "num_experts_per_tok": 1,
            }
        },
        checkpoint={"every": INTERVAL},
        evaluation={"max_tokens": 2000, "prompts": ["def "]},
    )


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_same_command_finishes_what_a_killed_driver_or_head_has_left(
    store: tuple[FaultyS3, str], undisturbed: Path, tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, __name__)
    kill, began = draw(seed), time.monotonic()
    run = config(tmp_path if kill.store == "disk" else f"s3://runs/seed-{seed}?{store[1]}")
    if kill.store != "disk":
        store[0].faults = seeded([kill.store], 1.0 if kill.store == "slow" else FAULTY_SHARE, seed)
    if kill.stage != "corpus":
        begin_with(run, undisturbed, "seed" if kill.stage == "seed" else "submodels")
    with spot_nodes() as nodes, contextlib.ExitStack() as after:
        add_pools(nodes, run)
        driver = after.enter_context(nodes.driver(run, tmp_path))
        await_moment(kill, driver, run.directory / "events.jsonl", undisturbed)
        if kill.target == "driver":
            driver.kill()
        else:
            nodes.kill_head()
            _log.info("%.1f s: the head is killed", time.monotonic() - began)
        assert driver.wait(END_SECONDS) != 0
        _log.info("%.1f s: the driver has ended", time.monotonic() - began)
        present = nodes if kill.target == "driver" else after.enter_context(spot_nodes())
        if present is not nodes:
            add_pools(present, run)
        again = after.enter_context(present.driver(run, tmp_path))
        assert again.wait(WAIT_SECONDS) == 0, (tmp_path / "output.log").read_text(encoding="utf-8")
        _log.info("seed %d, %.1f s: %s", seed, time.monotonic() - began, kill)
        present.check_nothing_is_left()
    check_outcome(run, undisturbed, with_seed=kill.stage in ("corpus", "seed"))


def add_pools(nodes: SpotNodes, run: RunConfig) -> None:
    nodes.add(run.pools.low_memory.resource, SLOTS)
    nodes.add(run.pools.high_memory.resource)


def begin_with(run: RunConfig, undisturbed: Path, stage: Stage) -> None:
    """Give a run what another one made before a stage, at its URI too."""
    begin_at(stage, run, undisturbed)
    at = RunStore.of(run.location)
    if at.is_remote:
        at.publish(run.directory / "config.json")
        for directory in [run.directory / stage.directory for stage in STAGES]:
            if (manifest := read_manifest(directory)) is not None:
                with commit(directory, manifest.fingerprint, at, manifest.stage, manifest.inputs) as draft:
                    shutil.copytree(
                        directory, draft.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json")
                    )
                    draft.summary.update(manifest.summary)


def await_moment(kill: Kill, driver: subprocess.Popen[bytes], log: Path, undisturbed: Path) -> None:
    """Wait until the run is where it is to be killed."""
    steps = kill.share * sum(unit["steps"] for unit in units(undisturbed, kill.stage)) if kill.trains else 0

    def reached() -> bool:
        assert driver.poll() is None, "the run ended before the kill"
        of_stage = [event for event in EventLog.read(log) if event.stage == kill.stage]
        made = {event.unit: event.data["step"] for event in of_stage if event.type == "progress"}
        return bool(of_stage) and sum(made.values()) >= steps

    until(reached, WAIT_SECONDS)
    time.sleep(kill.delay)


def check_outcome(run: RunConfig, undisturbed: Path, *, with_seed: bool) -> None:
    """The result is the same, no unit lost more than it may, and nothing is left that blocks another attempt."""
    at = RunStore.of(run.location)
    at.fetch(run.directory / "submodels", run.directory / "finetuned")
    same_outcome(run.directory, undisturbed)
    trained = (*(("seed",) if with_seed else ()), "submodels", "finetune")
    planned = {unit["name"]: unit["steps"] for stage in trained for unit in units(undisturbed, stage)}
    check_work(EventLog.read(run.directory / "events.jsonl"), planned, on_disk=not at.is_remote)
    assert not (run.directory / "checkpoints").exists()
    if at.is_remote:
        assert not is_leased(at)
        assert not [name for name in at.remote.list() if name.startswith(("checkpoints/", "receipts/"))]


def check_work(events: list[Event], planned: dict[str, int], *, on_disk: bool) -> None:
    """Every unit finished, step after step; the last steps that a killed driver did not hear of may be missing."""
    finished = {event.unit: event.data["steps"] for event in events if event.type == "unit_finished"}
    assert finished == planned
    for unit in attempts(events).values():
        assert all(attempt.in_a_row for attempt in unit)
        check_losses(unit, INTERVAL, on_disk=on_disk)
