"""Private API of Ray is on one page, and was checked with the installed version."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from moedisco_ray.execution.ray import ray_internals

ROOT = Path(__file__).resolve().parents[2]
PAGE = Path(ray_internals.__file__).relative_to(ROOT)
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
    return [name for name in names if name.startswith(UNDOCUMENTED) or any(part.startswith("_") for part in name.split("."))]


@pytest.mark.parametrize("source", [
    "from ray._private import state", "import ray._raylet", "from ray.train.v2._internal.exceptions import WorkerGroupError",
    "from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION",
    "import ray\nray._private.state.state.node_table()",
    "from ray.experimental.internal_kv import _internal_kv_get", "import_module('ray.autoscaler._private.aws.node_provider')",
])
def test_a_private_import_is_found(source: str) -> None:
    assert private(source)


def test_only_one_page_imports_private_api_of_ray() -> None:
    files = [path for room in ("moedisco_ray", "service") for path in (ROOT / room).rglob("*.py")]
    found = {path.relative_to(ROOT): private(path.read_text(encoding="utf-8")) for path in files}
    assert [path for path, names in found.items() if names] == [PAGE]


def test_the_page_was_checked_with_the_installed_ray() -> None:
    assert ray.__version__.startswith(f"{ray_internals.CHECKED_WITH}.")
