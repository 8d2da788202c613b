"""Recomputes the rows of a result file with the present accounting, from their run directories; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.compare.run import add_target, measured
from benchmarks.study.quality.levers import KNOWN
from moedisco_ray.core.artifacts import read_json
from moedisco_ray.core.config.renamed import stored_config


def reaccounted(result: Mapping[str, Any], work: Path) -> tuple[dict[str, Any], list[str]]:
    """Recompute the account of every row.

    Args:
        result: Content of a result file.
        work: Folder with the run directories.

    Returns:
        The result; and a line for each row that stays unchanged because its run directory is missing or contains another run.
    """
    rows, kept = [], []
    for row in result["rows"]:
        try:
            rows.append(_row(row, work))
        except (OSError, ValueError, KeyError) as error:    # UserError and the errors of pydantic and json are ValueErrors
            kept.append(f"{row['run']} is as it was: {' '.join(str(error).split())[:200]}")
            rows.append(dict(row))
    add_target(rows)
    return {**result, "command": repeatable(result["command"], result["cell"]), "rows": rows}, kept


def repeatable(command: str, cell: str) -> str:
    """The command with a placeholder for the corpora's folder, if it needs one that was not recorded."""
    return command if cell.startswith("embedded/") or " --corpus " in command else f"{command} --corpus DIR"


def _row(row: Mapping[str, Any], work: Path) -> dict[str, Any]:
    directory = work / row["run"]
    config = stored_config(read_json(directory / "config.json"))
    fresh = measured(row["arm"], KNOWN[row["arm"]], row["budget"], config.model_copy(update={"output": work}))
    if (fresh["tokens"], fresh["loss"]) != (row["tokens"], row["loss"]):
        raise ValueError(f"{directory} holds another run, with a loss of {fresh['loss']:.4f} after {fresh['tokens']:,} tokens")
    return {**row, **fresh}
