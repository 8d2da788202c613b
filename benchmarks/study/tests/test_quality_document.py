"""RESULTS.md is what its generator writes from the stored result files."""

from pathlib import Path

from benchmarks import document
from benchmarks.study.quality import absolutes, section, summary
from benchmarks.study.quality import result_files as files

BENCHMARKS = Path(__file__).resolve().parents[2]


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
