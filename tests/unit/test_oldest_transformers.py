"""The oldest transformers that pyproject.toml allows: every family's proofs, starts and exports pass with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from other_environments import ENVIRONMENTS

from docs.ecosystem import VERSION

FOLDER = ENVIRONMENTS / "transformers-oldest"
FILES = (
    "families",
    "upcycle",
    "start_is_kept",
    "export",
    "gguf_starts",
    "gguf_export",
    "lora",
    "given_tokens",
    "ensemble_package",
)
"""Tests that depend on transformers most; `-m ecosystem` chooses among them."""


@pytest.mark.ecosystem("Start: MoE of every family", "transformers", "torch")
@pytest.mark.timeout(1500)
def test_what_depends_on_transformers_passes_with_the_oldest_one(
    pytestconfig: pytest.Config, record_property: Callable[[str, object], None]
) -> None:
    if not FOLDER.is_dir():
        pytest.skip("transformers-oldest is not installed")
    found = next(FOLDER.glob("transformers-*.dist-info")).name.removesuffix(".dist-info").replace("-", " ")
    record_property(VERSION, found)
    allowed = found.removesuffix(".0").replace(" ", ">=")
    assert f'"{allowed},<6"' in (pytestconfig.rootpath / "pyproject.toml").read_text(encoding="utf-8"), "make it again"
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in FILES]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "ecosystem", "-p", "no:cacheprovider", *files],
        cwd=pytestconfig.rootpath,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
