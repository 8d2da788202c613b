"""RESULTS.md, its figures and the summary are what their generators write from the published files."""

from pathlib import Path

from benchmarks import document
from benchmarks.study.grid import files
from benchmarks.study.grid import section as grid_section
from benchmarks.study.grid.summary import summarise
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


def test_the_grids_summary_is_computed_from_its_published_pieces() -> None:
    pieces = files.published(files.PUBLISHED)
    assert pieces
    assert not any("uncommitted" in piece.made.commit for piece in pieces)
    assert list(grid_section.entries()) == summarise(pieces)


def test_raw_rows_are_not_published() -> None:
    published = [*BENCHMARKS.rglob("results/**/*.json"), *BENCHMARKS.rglob("results/**/*.jsonl")]
    assert sum(path.stat().st_size for path in published) < MOST_BYTES


def test_compare_ranks_the_arms_on_held_out_domains_as_the_tuned_benchmark_does() -> None:
    result = read_json(BENCHMARKS / "results" / "ranking.json")
    assert not result["dirty"]
    assert result["seeds"]
    for seed in result["seeds"]:
        assert seed["compare"]["ranking"] == seed["benchmark"]["ranking"]
        assert all(seed["compare"]["loss"][arm] <= loss + 1e-9 for arm, loss in seed["as configured"]["loss"].items())


def test_a_published_piece_is_read_back_without_entries_of_the_one_before(tmp_path: Path) -> None:
    one = files.published(files.PUBLISHED)[0]
    fewer = one.model_copy(update={"seed": one.seed + 1, "recipe": dict(list(one.recipe.items())[1:])})
    more = one.model_copy(update={"seed": one.seed + 2, "recipe": {**one.recipe, "submodels.sync_every": None}})
    for each in (one, fewer, more):
        files.write(tmp_path / "raw" / f"report-{each.seed}.json", each)
    files.publish(tmp_path / "raw", tmp_path)
    assert files.published(tmp_path) == [one, fewer, more]
