"""A run is ended from outside, and continues as if nothing had happened."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from small_run import OneCorpus, small_config

from moedisco_ray.core.errors import RunDirError, RunStopped
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.records.heartbeat import heartbeats
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.core.store.artifacts import read_manifest
from moedisco_ray.execution import pipeline

TOKENS = {"total": 30_000, "seed_share": 0.0, "finetune_share": 0.4}


def test_a_stopped_run_has_a_checkpoint_and_ends_as_the_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = pipeline.run(small_config(tmp_path / "undisturbed", tokens=TOKENS), backend=OneCorpus())
    config = small_config(tmp_path / "stopped", tokens=TOKENS, checkpoint={"every": 1000})
    stop = StopFile(tmp_path / "stop")

    def ask(event: Event) -> None:
        if event.type == "progress" and event.unit == "finetune" and event.data["step"] >= 5:
            stop.request("budget")

    with pytest.raises(RunStopped, match="budget"):
        pipeline.run(config, (ask,), backend=OneCorpus(), stop=stop)
    assert (last := EventLog.read(config.directory / "events.jsonl")[-1]).type == "run_stopped"
    assert last.data == {"reason": "budget"}
    assert list((config.directory / "checkpoints").glob("finetune-*/small-finetune/steps/step-*"))
    events: list[Event] = []
    pipeline.run(config, (events.append,), backend=OneCorpus())
    assert next(event.data["step"] for event in events if event.type == "progress") > 5
    ours, theirs = (run / "finetuned" / "model.safetensors" for run in (config.directory, undisturbed))
    assert ours.read_bytes() == theirs.read_bytes()
    meter = Meter()
    for event in EventLog.read(config.directory / "events.jsonl"):
        meter.update(event)
    spent = sum(unit["held"]["low_memory"] for unit in manifest_units(config.directory, "submodels"))
    assert meter.worker_seconds["low_memory"] == pytest.approx(spent, abs=1)
    assert meter.worker_seconds["high_memory"] > 0


def manifest_units(directory: Path, stage: str) -> list[dict[str, Any]]:
    manifest = read_manifest(directory / stage)
    assert manifest is not None
    units: list[dict[str, Any]] = manifest.summary["units"]
    return units


def test_a_run_that_is_asked_before_it_begins_begins_nothing(tmp_path: Path) -> None:
    config = small_config(tmp_path, tokens=TOKENS)
    stop = StopFile(tmp_path / "stop")
    stop.request("cancelled")
    with pytest.raises(RunStopped, match="cancelled"):
        pipeline.run(config, backend=OneCorpus(), stop=stop)
    assert not (config.directory / "corpus").exists()


def test_nobody_asks_where_there_is_no_file() -> None:
    NEVER.request("cancelled")
    NEVER.check()
    assert not NEVER.requested


def test_two_processes_never_work_on_one_run(tmp_path: Path) -> None:
    config = small_config(tmp_path, tokens=TOKENS)

    def begin_again(event: Event) -> None:
        if event.type == "stage_started":
            with pytest.raises(RunDirError, match="another process"):
                pipeline.run(config, backend=OneCorpus())
            raise RunStopped("cancelled")

    with pytest.raises(RunStopped):
        pipeline.run(config, (begin_again,), backend=OneCorpus())


def test_a_heartbeat_is_written_only_while_workers_are_held(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    beat = threading.Event()
    log.listen(lambda event: beat.set() if event.type == "heartbeat" else None)
    with heartbeats(log, interval=0.01):
        assert not beat.wait(0.1)
        log(Event("workers_held", data={"hold": "a", "pool": "low_memory", "workers": 1}))
        assert beat.wait(10)
        log(Event("workers_released", data={"hold": "a"}))
    log.close()


def test_a_heartbeat_that_finds_the_disk_full_is_not_the_last(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    beats = 0
    third = threading.Event()

    def disk(event: Event) -> None:
        nonlocal beats
        if event.type == "heartbeat":
            beats += 1
            if beats == 3:
                third.set()
            raise OSError(28, "No space left on device")

    log.listen(disk)
    with heartbeats(log, interval=0.001):
        log(Event("workers_held", data={"hold": "a", "pool": "low_memory", "workers": 1}))
        assert third.wait(10)
    log.close()
