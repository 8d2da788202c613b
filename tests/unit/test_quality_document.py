"""RESULTS.md is what its generator makes of the result files that are beside it."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
document, section, absolutes, files, summary = (
    pytest.importorskip(name)
    for name in ("document", "quality.section", "quality.absolutes", "quality.result_files", "quality.summary"))


def test_the_tables_of_quality_are_those_of_the_result_files():
    text = (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")
    results = [files.read(path) for path in files.result_paths()]
    for head, rows in (
        (section.HEAD, section.rows()), (section.LEVERS_HEAD, section.levers()), (section.PRICES_HEAD, section.prices()),
        (section.TRIED_HEAD, section.tried()), (absolutes.HEAD, absolutes.rows(results)),
        (absolutes.DOMAINS_HEAD, absolutes.domains(results)),
    ):
        assert document.table(head, rows) in text
    assert all(line in text for line in section.verdicts())
    assert files.read(files.RESULTS / files.SUMMARY) == summary.summarise(results)
