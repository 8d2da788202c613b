"""Rules of the architecture that no linter checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "ray", "numpy", "sklearn", "pyarrow", "datasets", "matplotlib")


@pytest.mark.parametrize(
    "module",
    ["moedisco_ray.core.config", "moedisco_ray.plan", "moedisco_ray.core.records.report", "moedisco_ray.cli.app"],
)
def test_start_up_imports_nothing_heavy(module: str) -> None:
    script = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    )
    assert not [name for name in loaded if name.split(".")[0] in HEAVY]


def test_files_stay_short() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "moedisco_ray").rglob("*.py")
    }
    assert not {str(path): lines for path, lines in lengths.items() if lines > 400}


def test_no_random_state_of_the_process_is_used() -> None:
    hidden = ("np.random.seed", "np.random.rand", "random.random(", "torch.manual_seed")
    guilty = [
        str(path)
        for path in (ROOT / "moedisco_ray").rglob("*.py")
        if any(call in path.read_text(encoding="utf-8") for call in hidden)
    ]
    assert not guilty
