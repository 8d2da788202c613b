"""Workers of Ray import nothing from the folder in which a run was started, except what the user has allowed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

SHADOWED = ("moedisco_ray", "numpy", "service", "torch", "yaml")
PLANTED = """\
import importlib, pathlib, sys
with open({marker!r}, "a") as file:
    file.write(f"{{__name__}} in {{pathlib.Path(sys.argv[0]).name}}; ")
sys.path = [folder for folder in sys.path if folder != {folder!r}]
del sys.modules[__name__]
importlib.import_module(__name__)
"""
"""Leaves a mark, then gives the module that it shadows."""
ALLOWED = """\
import pathlib, sys

def keep(row):
    raise ValueError("called in " + pathlib.Path(sys.argv[0]).name)
"""
"""A function whose error ends the run early, and says in which program it was called."""


@pytest.mark.parametrize("joins", [False, True])
def test_a_worker_imports_the_allowed_module_and_none_of_the_working_directory(
    tmp_path: Path, request: pytest.FixtureRequest, joins: bool
) -> None:
    """`ray.init` would put the working directory first in the search path of its workers.

    Workers of a Ray cluster that the run joins do not inherit its environment, and find the allowed module too.

    Before (af276e38): workers imported `numpy.py` of the working directory ("numpy in default_worker.py", once in
    each).
    """
    there, own, marker = tmp_path / "of others", tmp_path / "own", tmp_path / "code has run"
    there.mkdir()
    for name in SHADOWED:
        (there / f"{name}.py").write_text(PLANTED.format(marker=str(marker), folder=str(there)))
    own.mkdir()
    (own / "rows_of_a_user.py").write_text(ALLOWED)
    rows = own / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(200)))
    (own / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "small",
                "output": str(tmp_path / "runs"),
                "tokenizer": {"train_vocab_size": 350},
                "clusters": {"count": 2},
                "corpus": {"sequence_length": 32, "sources": [{"path": str(rows), "map": "rows_of_a_user:keep"}]},
            }
        )
    )
    program = Path(sys.executable).parent / "moedisco"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    if joins:
        request.getfixturevalue("ray_cluster")
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [program, "run", own / "run.yaml", "--allow-code", "rows_of_a_user:keep"],
        cwd=there,
        env={**environment, "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not marker.exists(), marker.read_text()
    assert "raises ValueError at rows_of_a_user.py:4" in done.stderr, done.stderr
    assert "called in default_worker.py" in done.stderr
    assert done.returncode == 2
