"""RESULTS.md, its figures and the summary are what their generators write from the published files."""

from pathlib import Path

from benchmarks import document
from benchmarks.study.quality import result_files, section, summary
from moedisco_ray.core.artifacts import read_json

BENCHMARKS = Path(__file__).resolve().parents[2]
MOST_BYTES = 320_000


def test_the_document_is_what_its_generator_writes() -> None:
    assert (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8") == document.page()
    assert all(path.exists() for folder in document.drawings() for path in document.figure_paths(folder))


def test_the_summary_is_computed_from_the_published_figures() -> None:
    stored = read_json(result_files.PUBLISHED / result_files.SUMMARY)
    assert stored == [entry.to_json() for entry in summary.summarise(section.results())]


def test_raw_rows_are_not_published() -> None:
    published = [*BENCHMARKS.rglob("results/**/*.json"), *BENCHMARKS.rglob("results/**/*.jsonl")]
    assert sum(path.stat().st_size for path in published) < MOST_BYTES
