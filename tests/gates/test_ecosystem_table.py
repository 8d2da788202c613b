"""The table of other programs: what tests record for it, and that it has a row for each that a test names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from docs import ecosystem

TESTS = """
import pytest
@pytest.mark.ecosystem("b", "pytest", "no-such-package")
@pytest.mark.parametrize("part", [1, 2])
def test_one(part, record_property):
    if part == 2:
        pytest.skip("it is Monday")
    record_property("measured", "42 apples")
    record_property("version", "other 1.2 beta")
    record_property("family", "mixtral")
@pytest.mark.ecosystem("a")
@pytest.mark.skipif(True, reason="x is not installed")
def test_two():
    raise AssertionError
@pytest.mark.ecosystem("c", "pytest")
@pytest.mark.parametrize("part", [1, 2])
def test_three(part, record_property):
    record_property("family", f"family-{part}")
    assert part == 1
def test_without_a_row():
    pass
"""


def test_each_row_says_what_passed_and_why_something_did_not(tmp_path: Path) -> None:
    (tmp_path / "test_rows.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = ecosystem: a row\n")
    arguments = [str(tmp_path / "test_rows.py"), "-q", "-c", str(tmp_path / "pytest.ini"), "-p", "no:cacheprovider"]
    assert (
        pytest.main(arguments, plugins=[ecosystem.Recorder(tmp_path / "record.json")]) == pytest.ExitCode.TESTS_FAILED
    )
    assert list(ecosystem.rows(tmp_path / "record.json")) == [
        ["a", "", "skipped: x is not installed"],
        [
            "b",
            f"pytest {pytest.__version__}, no-such-package (not installed), other 1.2 beta",
            "passed (1 test); 42 apples; skipped in part: it is Monday",
        ],
        ["c", f"pytest {pytest.__version__}", "**failed** (1 of 2 tests)"],
    ]
    found = json.loads((tmp_path / "record.json").read_text())
    assert {name: row["families"] for name, row in found.items()} == {"a": [], "b": ["mixtral"], "c": ["family-1"]}
    some = [*arguments, "-k", "test_three and 1"]  # this row alone is written anew
    assert pytest.main(some, plugins=[ecosystem.Recorder(tmp_path / "record.json")]) == pytest.ExitCode.OK
    assert [row[2].split(";")[0] for row in ecosystem.rows(tmp_path / "record.json")] == [
        "skipped: x is not installed",
        "passed (1 test)",
        "passed (1 test)",
    ]


def test_each_family_says_which_programs_compute_it_and_why_others_do_not(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps({row: {"families": ["mixtral", "phimoe"]} for row in ecosystem.PROGRAMS.values()}))
    found = {row[0]: row[1:] for row in ecosystem.families(record)}
    assert found["`mixtral`"] == ["yes", "yes", "yes", "yes, only with `sliding_window: null`"]
    assert found["`phimoe`"] == [
        "yes",
        "yes",
        "yes, if the head has no bias",
        "no: has RMSNorms in place of its norms, and weights its experts by a softmax that is scaled to sum to 1",
    ]
    assert found["`solar_open`"] == ["not tested", "no: does not know it", "not tested", "not tested"]


def test_the_record_has_an_answer_for_each_family_and_program() -> None:
    """A family without a test or a reason is missing; one with both has a reason that no longer holds."""
    assert "not tested" not in {cell for row in ecosystem.families() for cell in row}, "run `make test-ecosystem`"
    record = json.loads(ecosystem.RECORD.read_text(encoding="utf-8"))
    assert not {
        (program, name)
        for program, row in ecosystem.PROGRAMS.items()
        for name in record[row]["families"]
        if name in ecosystem.ABSENT[program]
    }


def test_the_table_has_a_row_for_each_that_a_test_names() -> None:
    others = (Path(__file__).parents[1] / "unit").glob("test_*.py")
    named = {
        name for path in others for name in re.findall(r'mark\.ecosystem\("([^"]+)"', path.read_text(encoding="utf-8"))
    }
    assert named <= json.loads(ecosystem.RECORD.read_text(encoding="utf-8")).keys(), "run `make test-ecosystem`"
    assert len(named) > 10
