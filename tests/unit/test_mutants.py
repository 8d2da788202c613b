"""The sample of mutants: each kind of change, which tests reach a module, and what counts as caught."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import mutants

SOURCE = """
def most(values, limit=3):
    if len(values) >= limit and not values[0]:
        raise ValueError(f"too many: {len(values) > 1}")
    total = sum(values) + 1
    return total
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree of one module and three test files: one checks its result, one only calls it, one does not import it."""
    for folder in ("service", "tests/unit"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "service/limits.py").write_text(SOURCE)
    (tmp_path / "tests/unit/limits_example.py").write_text("from service.limits import most\n")
    (tmp_path / "tests/unit/test_result.py").write_text(
        "from service import limits\n"
        "def test_broken():\n    assert False\n"
        "def test_sum():\n    assert limits.most([1]) == 2\n"
    )
    (tmp_path / "tests/unit/test_call.py").write_text(
        "import limits_example\ndef test_call():\n    limits_example.most([1])\n"
    )
    (tmp_path / "tests/unit/test_other.py").write_text("def test_other():\n    pass\n")
    return tmp_path


def test_every_change_leaves_a_program_and_none_is_within_formatted_text(tree: Path) -> None:
    changes = mutants.mutants_of(tree, "service/limits.py")
    assert all(mutants.is_program(tree, mutant) for mutant in changes)
    found = {(mutant.line, mutant.kind, mutant.after) for mutant in changes}
    assert found == {
        (2, "constant changed", "(7)"),
        (3, "comparison flipped", "(len(values) < limit)"),
        (3, "not removed", "(values[0])"),
        (3, "and/or swapped", "(len(values) >= limit or not values[0])"),
        (3, "constant changed", "(1)"),
        (4, "statement removed", "pass"),
        (5, "operator changed", "(sum(values) - 1)"),
        (5, "constant changed", "(3)"),
        (6, "None returned", "return None"),
    }


def test_a_draw_has_one_change_for_each_line_and_depends_on_the_seed_alone(tree: Path) -> None:
    drawn = mutants.draw(tree, 4, 1, ["service/limits.py"])
    assert len({mutant.line for mutant in drawn}) == 4
    assert drawn == mutants.draw(tree, 4, 1, ["service/limits.py"])


def test_tests_that_import_a_module_are_those_that_reach_it(tree: Path) -> None:
    reached = mutants.reaches(mutants.imports_of(tree, [str(path.relative_to(tree)) for path in tree.rglob("*.py")]))
    assert mutants.tests_of(reached, "service/limits.py") == ["tests/unit/test_result.py", "tests/unit/test_call.py"]
    assert mutants.tests_of(reached, "service/unused.py") == ["tests/unit"]


@pytest.mark.slow(reason="starts pytest many times, for a tool")
@pytest.mark.parametrize(
    ("kind", "outcome", "by"),
    [("None returned", "caught", "tests/unit/test_result.py::test_sum"), ("not removed", "survived", "")],
)
def test_a_change_is_caught_by_a_test_that_passes_without_it(tree: Path, kind: str, outcome: str, by: str) -> None:
    source = (tree / "service/limits.py").read_text()
    [mutant] = [each for each in mutants.mutants_of(tree, "service/limits.py") if each.kind == kind]
    found = mutants.judge(tree, mutant, ["tests/unit"], 60)
    assert (found["outcome"], found["by"], found["left_out"]) == (
        outcome,
        by,
        ["tests/unit/test_result.py::test_broken"],
    )
    assert (tree / "service/limits.py").read_text() == source
