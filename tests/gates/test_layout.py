"""Lines end at column 120, and no comprehension is inside another one: the inner result gets a name.

Ruff ignores what follows column 120 if it is a comment for a linter, and has no rule on nested comprehensions.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "cluster_yaml", "docs", "moedisco_ray", "service", "tests")
COLUMNS = 120
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def long_lines(source: str) -> Iterator[int]:
    for number, line in enumerate(source.splitlines(), 1):
        if len(line) > COLUMNS:
            yield number


def nested_comprehensions(source: str) -> Iterator[int]:
    """Lines of the comprehensions that hold another one."""
    for outer in ast.walk(ast.parse(source)):
        if isinstance(outer, COMPREHENSIONS):
            held = sum(isinstance(node, COMPREHENSIONS) for node in ast.walk(outer))
            if held > 1:
                yield outer.lineno


@pytest.mark.parametrize(
    "source",
    [
        "rows = [[x for x in row] for row in table]",
        "total = sum(max(n for n in row) for row in table)",
        "names = {key: value for key, value in ((k, v) for k, v in pairs)}",
        "picked = [f(lambda: {x for x in y}) for y in z]",
    ],
)
def test_a_nested_comprehension_is_found(source: str) -> None:
    assert list(nested_comprehensions(source)) == [1]


def test_neighbouring_comprehensions_and_several_loops_are_not_nested() -> None:
    assert not list(nested_comprehensions("a = f([x for x in y], {x for row in table for x in row if x})"))


def test_a_long_line_is_found_although_a_comment_for_a_linter_makes_it_long() -> None:
    assert list(long_lines(f"short\n{'x' * 100}  # noqa: ARG001 - a reason\n")) == [2]
    assert not list(long_lines("x" * COLUMNS))


def test_lines_are_short_and_comprehensions_are_not_nested() -> None:
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            source, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT)
            found += [f"{name}:{line} is longer than {COLUMNS} characters" for line in long_lines(source)]
            found += [f"{name}:{line} holds another comprehension" for line in nested_comprehensions(source)]
    assert not found
