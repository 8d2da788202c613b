"""Writes the files from which the documents are made: the numbers of raw results that tables and figures show.

    python -m benchmarks.study.quality.publish [--results runs/quality/results] [--output benchmarks/study/quality/results]

`cells.jsonl` has one line per (cell, seed) and `curves.jsonl` one per drawn cell; `summary.json` is computed from the former. A
(cell, seed) without a raw result stays as it was published.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.harness import shortened
from benchmarks.study.compare.arms import ARMS
from benchmarks.study.compare.figures import Drawing, drawing
from benchmarks.study.compare.records import Row
from benchmarks.study.quality import absolutes
from benchmarks.study.quality.records import AbsoluteFigures, CellFigures, CellResult, RunFigures
from benchmarks.study.quality.result_files import (
    CELLS,
    CURVES,
    PUBLISHED,
    RAW,
    SUMMARY,
    read,
    read_lines,
    result_paths,
    write_entries,
    write_lines,
)
from benchmarks.study.quality.summary import summarise
from moedisco_ray.core.config import PoolName

DRAWN_FAMILY = "qwen3_moe"
"""Family whose cells are drawn; the other family's plots look alike."""
DRAWN_SEED = 0
_DIGITS = 7
"""Significant digits of numbers that documents show with two or three; perplexities and dollars keep all of theirs."""


def condensed(result: CellResult) -> CellFigures:
    """The figures of a raw result that tables show."""
    return CellFigures(
        cell=result.cell, seed=result.seed, command=result.command, commits=result.commits, date=result.date,
        processor=result.processor, cores=result.cores, versions=result.versions, setting=result.setting,
        runs=tuple(map(_run, result.rows)))


def curves(result: CellResult) -> Drawing:
    """The loss curves of a raw result that figures show; levers appear only in tables."""
    rows = [row for row in result.rows if row.arm in ARMS]
    return drawing(result.cell, rows[0].curve[-1].loss, rows)


def publish(raw: Path, folder: Path) -> None:
    """Write the published files.

    Args:
        raw: Folder of the raw results.
        folder: Folder of the published files.
    """
    cells = {(each.cell, each.seed): each for each in read_lines(folder / CELLS, CellFigures)}
    drawings = {each.name: each for each in read_lines(folder / CURVES, Drawing)}
    for result in map(read, result_paths(raw)):
        cells[result.cell, result.seed] = condensed(result)
        if result.cell.split("/")[1] == DRAWN_FAMILY and result.seed == DRAWN_SEED:
            drawings[result.cell] = curves(result)
    ordered = [cells[key] for key in sorted(cells)]
    write_lines(folder / CELLS, ordered)
    write_lines(folder / CURVES, [
        Drawing.model_validate(shortened(drawings[name].model_dump(mode="json", exclude_none=True))) for name in sorted(drawings)])
    write_entries(folder / SUMMARY, (entry.to_json() for entry in summarise(ordered)))


def _run(row: Row) -> RunFigures:
    dollars: dict[PoolName, list[float]] = {}
    for phase in row.phases:
        dollars.setdefault(phase.pool, []).append(phase.dollars)
    return RunFigures(
        arm=row.arm, budget=row.budget, perplexity=row.perplexity,
        dollars={pool: tuple(phases) for pool, phases in dollars.items()}, hours=_short(row.hours),
        metered=row.joint_metered_dollars and _short(row.metered_dollars / row.joint_metered_dollars),
        unseen=row.unseen and _short(row.unseen), absolute=_absolute(row) if row.arm in absolutes.SHOWN else None)


def _absolute(row: Row) -> AbsoluteFigures | None:
    if row.bits_per_byte is None or row.specialisation is None or row.dead_experts is None or row.sources is None:
        return None
    return AbsoluteFigures(
        bits_per_byte=_short(row.bits_per_byte),
        specialisation={name: None if value is None else _short(value) for name, value in row.specialisation.items()},
        dead_experts=row.dead_experts, worker_seconds=_short(sum(row.worker_seconds.values())),
        sources={name: _short(value) for name, value in row.sources.items()})


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RAW, help="folder of the raw results")
    parser.add_argument("--output", type=Path, default=PUBLISHED, help="folder of the published files")
    arguments = parser.parse_args()
    publish(arguments.results, arguments.output)


if __name__ == "__main__":
    main()
