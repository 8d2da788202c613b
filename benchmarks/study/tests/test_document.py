"""RESULTS.md and the grid's summary are what their generators write from the published files."""

from pathlib import Path

from benchmarks import document
from benchmarks.study.grid import files
from moedisco_ray.core.store.artifacts import read_json

BENCHMARKS = Path(__file__).resolve().parents[2]
MOST_BYTES = 165_000


def test_the_document_is_what_its_generator_writes() -> None:
    assert (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8") == document.page()


def test_the_grids_summary_is_computed_from_its_published_pieces(tmp_path: Path) -> None:
    pieces = files.published(files.PUBLISHED)
    assert pieces
    assert not any("uncommitted" in piece.made.commit for piece in pieces)
    for name in (files.PIECES, files.TUNED):
        (tmp_path / name).write_bytes((files.PUBLISHED / name).read_bytes())
    files.publish(tmp_path / "nothing", tmp_path)
    assert files.published(tmp_path) == pieces  # sweeps too say the same of them
    assert [(tmp_path / name).read_bytes() for name in (files.PIECES, files.TUNED)] == [
        (files.PUBLISHED / name).read_bytes() for name in (files.PIECES, files.TUNED)
    ]
    assert read_json(tmp_path / files.SUMMARY) == read_json(files.PUBLISHED / files.SUMMARY)


def test_pieces_keep_the_values_with_which_they_were_measured() -> None:
    """Of settings too that are constants now, whose values are others."""
    clustered = [piece.recipe for piece in files.published(files.PUBLISHED) if "clusters.vectors" in piece.recipe]
    assert {(each.get("clusters.restarts"), each.get("clusters.sample")) for each in clustered} == {(2, 2000)}
    assert "k-means had 2 restarts on a sample of 2,000 documents; it now always has 4 on 10,000" in document.page()


def test_raw_rows_are_not_published() -> None:
    published = [*BENCHMARKS.rglob("results/**/*.json"), *BENCHMARKS.rglob("results/**/*.jsonl")]
    assert sum(path.stat().st_size for path in published) < MOST_BYTES


def test_a_published_piece_is_read_back_without_entries_of_the_one_before(tmp_path: Path) -> None:
    one = files.published(files.PUBLISHED)[0]
    fewer = one.model_copy(update={"seed": one.seed + 1, "recipe": dict(list(one.recipe.items())[1:])})
    more = one.model_copy(update={"seed": one.seed + 2, "recipe": {**one.recipe, "submodels.sync_every": None}})
    for each in (one, fewer, more):
        files.write(tmp_path / "raw" / f"report-{each.seed}.json", each)
    files.publish(tmp_path / "raw", tmp_path)
    assert files.published(tmp_path) == [one, fewer, more]
