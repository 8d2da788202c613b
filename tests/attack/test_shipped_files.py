"""No shipped command lets tenants read each other's runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "cluster_yaml"
STARTING = [
    path
    for path in sorted(FOLDER.rglob("*"))
    if path.suffix in (".sh", ".yaml") and "--output-root" in path.read_text(encoding="utf-8")
]


def test_the_files_that_start_the_service_are_found() -> None:
    assert {"head.sh", "kuberay.yaml"} <= {path.name for path in STARTING}


@pytest.mark.parametrize("path", STARTING, ids=lambda path: path.name)
def test_no_output_root_is_inside_an_input_root(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    outputs, inputs = (re.findall(rf"--{kind}-root[= ]([^\s\",\]]+)", text) for kind in ("output", "input"))
    assert outputs
    assert inputs  # the default, the working directory, may hold anything
    assert not [(out, into) for out in outputs for into in inputs if f"{out}/".startswith(f"{into}/")]
