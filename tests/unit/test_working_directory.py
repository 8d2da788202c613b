"""Commands that a user starts in a folder of other people import nothing from that folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moedisco_ray.core.config.presets import preset_text

SHADOWED = ("torch", "numpy", "moedisco_ray", "service", "json", "transformers", "yaml", "ray")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a configuration, and modules under names that Python searches for; each makes a marker."""
    place = tmp_path / "of others"
    place.mkdir()
    for name in SHADOWED:
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'code has run')!r}, 'a').write('{name} ')\n")
    (place / "demo.yaml").write_text(preset_text("demo"))
    return place


def moedisco(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed program there, with empty caches."""
    program = Path(sys.executable).parent / "moedisco"
    own = {"MOEDISCO_CACHE_DIR": str(folder.parent / "cache"), "HOME": str(folder.parent)}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | own
    return subprocess.run(
        [program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.slow
def test_a_plan_measures_this_machine_without_the_modules_of_the_working_directory(folder: Path) -> None:
    """The speed probe is a process of its own; `python -m` would search the working directory first.

    Before (af276e38): the probe imported `moedisco_ray.py` of the working directory.
    """
    done = moedisco(folder, "plan", "demo.yaml")
    assert done.returncode == 0, done.stderr
    marker = folder.parent / "code has run"
    assert not marker.exists(), marker.read_text()


@pytest.mark.slow
def test_a_gguf_file_is_read_without_the_modules_of_the_working_directory(folder: Path) -> None:
    """Before (af276e38): the process that reads GGUF imported `moedisco_ray.py` of the working directory."""
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    done = moedisco(folder, "evaluate", "model.gguf", "--sources", "demo.yaml")
    assert done.returncode == 2
    marker = folder.parent / "code has run"
    assert not marker.exists(), marker.read_text()
