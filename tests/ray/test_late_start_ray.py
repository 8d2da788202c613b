"""A local Ray whose agent is late, as on a busy machine, is started again, and the run ends well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import begin_at, small_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

LATE = """\
import os, pathlib, time
first = pathlib.Path(os.environ["FIRST_START"])
if "runtime_env/agent/main.py" in pathlib.Path("/proc/self/cmdline").read_text() and not first.exists():
    first.touch()
    time.sleep(60)
"""
"""Runs at the start of each Python process: the first agent says its port after the 15 s for which Ray waits."""


def test_a_late_agent_costs_a_second_start(undisturbed: Path, tmp_path: Path) -> None:
    """Before (af276e38): exit code 1, and a traceback that ended in "The current node timed out during startup"."""
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "sitecustomize.py").write_text(LATE)
    config = tmp_path / "small.json"
    config.write_text(small_config(tmp_path).model_dump_json())
    begin_at("export", small_config(tmp_path), undisturbed)  # the other stages need no second Ray
    environment = {
        "PYTHONPATH": str(tmp_path / "late"),
        "FIRST_START": str(tmp_path / "first"),
        "RAY_AUTH_MODE": "disabled",
    }
    run = subprocess.run(
        [sys.executable, "-m", "moedisco_ray", "run", str(config)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("starts Ray") == 2
    assert "warning: Ray did not start (The current node timed out during startup" in run.stdout
