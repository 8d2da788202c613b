"""A run reads its start model's weights once to verify them, and not at all if the disk is trusted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from damaged_runs import flip_bit
from pinned_runs import config_of

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import DamagedError, RunStopped
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.artifacts import write_manifest
from moedisco_ray.core.store.checksums import stored_entries
from moedisco_ray.core.store.manifests import FILES
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run that starts from an exported model."""
    config, start = config_of("olmoe", tmp_path), tmp_path / "start"
    write_manifest(start, {"stage": "export", FILES: stored_entries(start)})
    return config


def decompose(config: RunConfig, home: Path, *, damaged_after: str = "", verifies: bool = True) -> None:
    """Make the stages up to the decomposition, the second one that reads the start model's weights."""
    stop = StopFile(home / "stop")

    def listen(event: Event) -> None:
        if event.type == "stage_finished" and event.stage == damaged_after:
            damage(home)
        if event.type == "stage_finished" and event.stage == "decompose":
            stop.request("cancelled")

    with pytest.raises(RunStopped):
        pipeline.run(config, (listen,), backend=LocalBackend(), stop=stop, verifies=verifies)
    assert (config.directory / "decomposed" / "manifest.json").exists()


def damage(home: Path) -> None:
    """Flip a bit of the weights as a disk does: without a change of the file's times."""
    path = home / "start" / "model.safetensors"
    before = path.stat()
    flip_bit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_start_model_is_verified_once_per_run(config: RunConfig, tmp_path: Path) -> None:
    """Before (2a4777cc): the decomposition read all weights again to verify them, and ended with the damage."""
    decompose(config, tmp_path, damaged_after="seed")


def test_a_damaged_start_model_is_named(config: RunConfig, tmp_path: Path) -> None:
    damage(tmp_path)
    with pytest.raises(DamagedError, match=r"start/model\.safetensors .*is damaged: it is not what stage export wrote"):
        decompose(config, tmp_path)


def test_who_trusts_the_disk_starts_without_verifying(config: RunConfig, tmp_path: Path) -> None:
    """Before (2a4777cc): all weights were read to verify them, and the run ended, in spite of `--no-verify`."""
    damage(tmp_path)
    decompose(config, tmp_path, verifies=False)
