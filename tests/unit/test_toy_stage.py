"""A stage is added by two new files and a line of `core.stages`: plan, run, report and fingerprints then know it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORK = """
from moedisco_ray.core.store.artifacts import Draft, write_json
from moedisco_ray.stages.context import Context


def run(context: Context, draft: Draft) -> None:
    write_json(draft.path / "count.json", len(list(context.of("finetune").iterdir())))
    draft.summary.update({"counted": True})
"""
COST = """
from moedisco_ray.plan.stage_cost import StageCost

COST = StageCost(
    estimate=lambda reading: reading.divided("count", reading.config.finetune_pool, 7.0),
    storage=lambda files: files.models("count", read=files.whole, stored=10),
)
"""
LINE = """
    Stage("count", "counted", ("finetune",), ("seed",), _with_the_gang, "moedisco_ray.stages.count:run",
          "moedisco_ray.plan.stages.count:COST"),
"""
PROGRAM = """
import json, sys
from pathlib import Path
import pinned_runs
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.plan import build_plan

config = pinned_runs.config_of("qwen3_moe", Path(sys.argv[1]))
plan = build_plan(config)
directory = pipeline.run(config, backend=LocalBackend())
report = json.loads((directory / "report.json").read_text())
print(json.dumps({
    "estimates": [each.stage for each in plan.estimates], "files": [each.stage for each in plan.storage],
    "report": [each["name"] for each in report["stages"]], "made": (directory / "counted" / "count.json").exists(),
    "finished": pipeline.is_finished(config)}))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stage_is_two_files_and_a_line(tmp_path: Path) -> None:
    package = tmp_path / "code" / "moedisco_ray"
    shutil.copytree(ROOT / "moedisco_ray", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "stages" / "count.py").write_text(WORK)
    (package / "plan" / "stages" / "count.py").write_text(COST)
    stages = package / "core" / "stages.py"
    before, evaluate, after = stages.read_text().partition('    Stage(\n        "evaluate",')
    assert evaluate
    stages.write_text(before + LINE + evaluate + after)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{package.parent}:{ROOT / 'tests' / 'unit'}", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for known in ("estimates", "files", "report"):
        assert found[known].index("count") == found[known].index("evaluate") - 1
    assert found["made"]
    assert found["finished"]
