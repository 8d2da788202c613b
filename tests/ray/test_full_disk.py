"""A disk that is full ends a run in one line, on Ray too, and leaves a run that the same command continues."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import small_config

from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.records.run_report import current_report
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

FEW = {
    "tokens": {"total": 24_000, "seed_share": 0.25, "finetune_share": 0.25},
    "clusters": {"count": 2, "vectors": "hidden_state"},
    "evaluation": {"max_tokens": 3000},
    "merge": {"calibration_tokens": 1024},
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which a test may fill."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["512k", "3m"])
def test_a_full_disk_is_one_line_and_the_run_continues(disk: Path, size: str) -> None:
    config = small_config(disk / "runs", **FEW)
    resize(disk, size)
    with pytest.raises(RunDirError, match="the disk is full; free some space and run the command again"):
        pipeline.run(config, backend=LocalBackend())
    resize(disk, "64m")
    pipeline.run(config, backend=LocalBackend())
    assert current_report(config.directory).state == "finished"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_full_disk_is_one_line_on_ray(disk: Path) -> None:
    config = small_config(disk / "runs", **FEW)
    resize(disk, "1m")
    with pytest.raises(RunDirError, match="the disk is full; free some space and run the command again"):
        pipeline.run(config)
    assert current_report(config.directory).state in ("failed", "interrupted")
