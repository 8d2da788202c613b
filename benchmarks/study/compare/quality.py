"""Leaves in each run of a comparison what the comparison measured of its quality, for the run's bill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moedisco_ray.core.artifacts import read_json, write_json
from moedisco_ray.core.bill import format_dollars
from moedisco_ray.core.config.renamed import stored_config
from moedisco_ray.core.report import build_report

_BUDGETS = {"tokens": "as many tokens", "dollars": "as many planned dollars", "loss": "about as low a loss"}


def note_quality(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `comparison.json` into every run directory, and its report again.

    Args:
        output: Of the comparison; holds the run directories.
        rows: As in `compare.json`, joint training's first.
    """
    joint = rows[0]
    for row in rows[1:]:
        directory = output / row["run"]
        write_json(directory / "comparison.json", {"quality": quality(row, joint)})
        config = stored_config(read_json(directory / "config.json"))
        write_json(directory / "report.json", build_report(directory, config).to_json())


def quality(row: Mapping[str, Any], joint: Mapping[str, Any]) -> str:
    """One sentence: a run's held-out perplexity against joint training's, each with its metered dollars.

    Args:
        row: A run of the comparison.
        joint: Joint training's.
    """
    return (
        f"A comparison measured held-out perplexity: {row['perplexity']:.2f} against {joint['perplexity']:.2f} of joint training, "
        f"with {_BUDGETS[row['budget']]} ({format_dollars(row['metered_dollars'])} against "
        f"{format_dollars(joint['metered_dollars'])}, metered).")
