"""Stores in each run directory the quality that a comparison measured, for the run's bill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.compare.records import Row
from moedisco_ray.core.artifacts import read_json, write_json
from moedisco_ray.core.bill import format_dollars
from moedisco_ray.core.config.renamed import stored_config
from moedisco_ray.core.report import build_report

_BUDGETS = {"tokens": "as many tokens", "dollars": "as many planned dollars", "loss": "about as low a loss"}


def note_quality(output: Path, rows: Sequence[Row]) -> None:
    """Write `comparison.json` into every run directory, and update the run's report.

    Args:
        output: Directory of the comparison, with the run directories.
        rows: Rows of `compare.json`, joint training first.
    """
    joint = rows[0]
    for row in rows[1:]:
        directory = output / row.run
        write_json(directory / "comparison.json", {"quality": quality(row, joint)})
        config = stored_config(read_json(directory / "config.json"))
        write_json(directory / "report.json", build_report(directory, config).to_json())


def quality(row: Row, joint: Row) -> str:
    """One sentence that compares a run's held-out perplexity and metered dollars with those of joint training.

    Args:
        row: Row of the run.
        joint: Row of joint training.
    """
    return (
        f"A comparison measured held-out perplexity: {row.perplexity:.2f} against {joint.perplexity:.2f} of joint training, "
        f"with {_BUDGETS[row.budget]} ({format_dollars(row.metered_dollars)} against "
        f"{format_dollars(joint.metered_dollars)}, metered).")
