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
@pytest.mark.ecosystem("a")
@pytest.mark.skipif(True, reason="x is not installed")
def test_two():
    raise AssertionError
@pytest.mark.ecosystem("c", "pytest")
@pytest.mark.parametrize("part", [1, 2])
def test_three(part):
    assert part == 1
def test_without_a_row():
    pass
"""


def test_each_row_says_what_passed_and_why_something_did_not(tmp_path: Path) -> None:
    (tmp_path / "test_rows.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = ecosystem: a row\n")
    arguments = [str(tmp_path / "test_rows.py"), "-q", "-c", str(tmp_path / "pytest.ini"), "-p", "no:cacheprovider"]
    assert pytest.main(arguments, plugins=[ecosystem.Recorder(tmp_path / "record.json")]) == pytest.ExitCode.TESTS_FAILED
    assert list(ecosystem.rows(tmp_path / "record.json")) == [
        ["a", "", "skipped: x is not installed"],
        ["b", f"pytest {pytest.__version__}, no-such-package (not installed), other 1.2 beta",
         "passed (1 test); 42 apples; skipped in part: it is Monday"],
        ["c", f"pytest {pytest.__version__}", "**failed** (1 of 2 tests)"]]
    assert ecosystem.programs(tmp_path / "record.json") == (
        f"no-such-package (not installed), other 1.2 beta, pytest {pytest.__version__}")
    some = [*arguments, "-k", "test_three and 1"]       # this row alone is written anew
    assert pytest.main(some, plugins=[ecosystem.Recorder(tmp_path / "record.json")]) == pytest.ExitCode.OK
    assert [row[2].split(";")[0] for row in ecosystem.rows(tmp_path / "record.json")] == [
        "skipped: x is not installed", "passed (1 test)", "passed (1 test)"]


def test_the_table_has_a_row_for_each_that_a_test_names() -> None:
    others = (path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
    named = {name for path in others for name in re.findall(r'mark\.ecosystem\("([^"]+)"', path.read_text(encoding="utf-8"))}
    assert named <= json.loads(ecosystem.RECORD.read_text(encoding="utf-8")).keys(), "run `make test-ecosystem`"
    assert len(named) > 10
