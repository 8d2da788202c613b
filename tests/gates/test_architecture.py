"""Rules of the architecture that no linter checks."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moedisco_ray.core.stages import STAGES

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
    hidden = re.compile(r"np\.random\.(seed|rand)|random\.random\(|torch\.manual_seed")
    files = (ROOT / "moedisco_ray").rglob("*.py")
    assert not [str(path) for path in files if hidden.search(path.read_text(encoding="utf-8"))]


def test_what_a_stage_is_stands_on_its_object_and_is_not_asked_of_its_name() -> None:
    """A stage that is added could not answer a comparison with the names of the others.

    Before: 21 comparisons in 15 files.
    """
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("moedisco_ray", "service")
        for path in (ROOT / folder).rglob("*.py")
        for line in _compared_stages(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not found


def _compared_stages(tree: ast.Module) -> Iterator[int]:
    """Lines on which something of a stage is compared with the name of a stage, or looked for among such names."""
    names = {stage.name for stage in STAGES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            literal = any(isinstance(each, ast.Constant) and each.value in names for each in ast.walk(node))
            if literal and any("stage" in ast.unparse(each).lower() for each in sides):
                yield node.lineno
