"""Private API of Ray is on one page each for Ray, Ray Train and Ray Data, checked with the installed version."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from moedisco_ray.execution.ray import ray_internals

ROOT = Path(__file__).resolve().parents[2]
ROOM = Path(ray_internals.__file__).parent.relative_to(ROOT)
PAGES = {ROOM / f"{page}_internals.py" for page in ("ray", "ray_train", "ray_data")}
UNDOCUMENTED = ("ray.autoscaler", "ray.core", "ray.dashboard", "ray.experimental", "ray.train.v2")


def imported(source: str) -> Iterator[str]:
    """Full names of what a file imports, also by `importlib`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("ray."):
            yield node.value


def private(source: str) -> list[str]:
    names = [name for name in imported(source) if name.startswith("ray.")]
    return [name for name in names if name.startswith(UNDOCUMENTED) or "._" in name]


@pytest.mark.parametrize(
    "source",
    [
        "from ray._private import state",
        "import ray._raylet",
        "from ray.train.v2._internal.exceptions import WorkerGroupError",
        "from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION",
        "import ray\nray._private.state.state.node_table()",
        "from ray.experimental.internal_kv import _internal_kv_get",
        "import_module('ray.autoscaler._private.aws.node_provider')",
    ],
)
def test_a_private_import_is_found(source: str) -> None:
    assert private(source)


def test_only_its_pages_import_private_api_of_ray() -> None:
    files = [path for room in ("moedisco_ray", "service") for path in (ROOT / room).rglob("*.py")]
    found = {path.relative_to(ROOT): private(path.read_text(encoding="utf-8")) for path in files}
    assert {path for path, names in found.items() if names} == PAGES


def test_the_page_was_checked_with_the_installed_ray() -> None:
    assert ray.__version__.startswith(f"{ray_internals.CHECKED_WITH}.")


@pytest.mark.parametrize("module", ["draining", "spot_fallback"])
def test_what_runs_in_a_last_second_or_on_a_small_head_does_not_import_ray_train(module: str) -> None:
    script = (
        f"import json, sys, moedisco_ray.execution.ray.autoscaling.{module}; print(json.dumps(sorted(sys.modules)))"
    )
    loaded = json.loads(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    )
    assert not {"torch", "pandas", "ray.train", "ray.data"} & set(loaded)
