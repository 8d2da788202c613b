"""Held-out loss against tokens, dollars and hours, of every cell in which more than the grid's recipes were run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moedisco_ray.compare.arms import ARMS
from moedisco_ray.compare.figures import plot_comparison

GRID = {"joint", "disco", "paper"}


def draw(results: Path) -> list[Path]:
    """Draw the first seed of each such cell, into a folder of the cell's name in `results`; levers are left to the table."""
    drawn: list[Path] = []
    for path in sorted(results.glob("*-0.json")):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in result["rows"] if row["arm"] in ARMS]
        if {row["arm"] for row in rows} > GRID:
            shown = {"name": result["cell"], "rows": rows, "target_loss": rows[0]["curve"][-1]["loss"]}
            drawn += plot_comparison(shown, results / result["cell"].replace("/", "-"))
    return drawn
