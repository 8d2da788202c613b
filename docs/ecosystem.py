"""The table of other programs and formats that tests have shown to work, and the plugin of pytest that records it.

A test names its row, and the packages whose versions the row shows: `@pytest.mark.ecosystem("Start: GGUF file", "gguf")`.
`make test-ecosystem` runs these tests with this plugin, which writes the results to `RECORD`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

RECORD = Path(__file__).with_suffix(".json")
TRACKERS = RECORD.parents[1] / "build" / "environments" / "trackers"
"""Folder of the trackers' libraries, which the development tools do not include. All tests of the session can import them."""
HEAD = ["what", "tested with", "result"]
MARK = "ecosystem"
MEASURED = "measured"
"""Name under which a test records a text for its row, with pytest's `record_property`."""
VERSION = "version"
"""Name under which a test records a package of another environment with its version, such as `vllm 0.32.0`."""


def rows(record: Path = RECORD) -> Iterator[list[str]]:
    """The rows of the table, as the last complete run of the tests left them."""
    for what, row in json.loads(record.read_text(encoding="utf-8")).items():
        count, skipped = row["passed"] + row["failed"], "; ".join(row["skipped"])
        result = f"passed ({count} {'test' if count == 1 else 'tests'})" if count else f"skipped: {skipped}"
        result = f"**failed** ({row['failed']} of {count} tests)" if row["failed"] else result
        parts = [result, *row[MEASURED], *([f"skipped in part: {skipped}"] if count and skipped else [])]
        versions = [*(f"{name} {found}" for name, found in row["versions"].items()), *row.get("elsewhere", [])]
        yield [what, ", ".join(versions), "; ".join(parts)]


def programs(record: Path = RECORD) -> str:
    """The programs of rows that passed, each with its versions: `peft 0.21.2, transformers 4.57.6 and 5.24.0`."""
    found: dict[str, set[str]] = {}
    for row in json.loads(record.read_text(encoding="utf-8")).values():
        passed = row["passed"] > 0 and row["failed"] == 0
        for program in [*map(" ".join, row["versions"].items()), *row.get("elsewhere", [])] if passed else ():
            name, _, number = program.partition(" ")
            found.setdefault(name, set()).add(number)
    return ", ".join(f"{name} {_listed(sorted(numbers))}" for name, numbers in sorted(found.items()))


class Recorder:
    """Collects the results of tests by the row that they name, and writes them when the last test has ended.

    A session of some files or names only keeps the rows of all other tests.
    """

    def __init__(self, record: Path = RECORD) -> None:
        self._record = record
        self._rows: dict[str, dict[str, Any]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:      # properties of an item arrive with its reports, also from other processes
            item.user_properties += [(MARK, list(mark.args)) for mark in item.iter_markers(MARK)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for what, *packages in (value for name, value in report.user_properties if name == MARK):
            row = self._rows.setdefault(what, {
                "versions": {name: _version(name) for name in packages}, "elsewhere": [], "passed": 0, "failed": 0,
                "skipped": [], MEASURED: []})
            if report.failed:
                row["failed"] += 1
            elif report.skipped and isinstance(report.longrepr, tuple):
                row["skipped"] = sorted({*row["skipped"], report.longrepr[2].removeprefix("Skipped: ")})
            elif report.when == "call":
                row["passed"] += 1
                row[MEASURED] += [value for name, value in report.user_properties if name == MEASURED]
                found = {value for name, value in report.user_properties if name == VERSION}
                row["elsewhere"] = sorted({*row["elsewhere"], *found})

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not hasattr(session.config, "workerinput")
        if self._rows and complete:
            whole = session.config.args_source is not pytest.Config.ArgsSource.ARGS and not session.config.option.keyword
            others = json.loads(self._record.read_text(encoding="utf-8")) if not whole and self._record.exists() else {}
            text = json.dumps(dict(sorted({**others, **self._rows}.items())), indent=2)
            self._record.write_text(f"{text}\n", encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    if TRACKERS.is_dir():
        sys.path.append(str(TRACKERS))
    config.pluginmanager.register(Recorder())


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
