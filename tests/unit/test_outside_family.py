"""A family of another package is like any other once installed, and the generated proofs hold for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = """
import dataclasses
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from moedisco_ray.core.families import mixtral, qwen3_moe

class LabMoeConfig(Qwen3MoeConfig):
    model_type = "lab_moe"

class LabMoeForCausalLM(Qwen3MoeForCausalLM):
    config_class = LabMoeConfig

AutoConfig.register("lab_moe", LabMoeConfig)
AutoModelForCausalLM.register(LabMoeConfig, LabMoeForCausalLM)
register_checkpoint_conversion_mapping("lab_moe", get_checkpoint_conversion_mapping("qwen3_moe"))
FAMILY = dataclasses.replace(qwen3_moe.FAMILY, name="lab_moe", gguf=None)
IMPOSTOR = dataclasses.replace(mixtral.FAMILY, block="elsewhere")
"""
ENTRY_POINTS = "[moedisco_ray.families]\nlab = lab_family:FAMILY\nimpostor = lab_family:IMPOSTOR\n"
KNOWN = """
from moedisco_ray.core.config import FAMILIES, check_config
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import ModelMap

assert FAMILIES[0] == "mixtral" and FAMILIES[-1] == "lab_moe", FAMILIES
assert DECLARATIONS["mixtral"].block == "block_sparse_moe"
assert [name for name in FAMILIES if "qwen3" in DECLARATIONS[name].dense][0] == "qwen3_moe"
config = check_config({
    "name": "lab", "corpus": {"sources": [{"path": "embedded"}]}, "model": {"family": "lab_moe"},
    "tokens": {"total": 10_000_000}})
assert ModelMap(config.model.family_name).family.gguf is None
"""
PROOFS = [
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "tests/unit/test_families.py",
    "-k",
    "lab_moe",
    "-m",
    "not slow",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "line"), [(["-c", KNOWN], ""), pytest.param(PROOFS, " passed", marks=pytest.mark.slow)]
)
def test_an_installed_package_adds_a_family_and_can_run_the_proofs(
    arguments: list[str], line: str, tmp_path: Path
) -> None:
    (tmp_path / "lab_family.py").write_text(MODULE)
    installed = tmp_path / "lab_family-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-family\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(ENTRY_POINTS)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert line in done.stdout
