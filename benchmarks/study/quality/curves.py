"""Plots the held-out loss over tokens, dollars and hours for the cells of one family; the other family's plots look alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.study.compare.arms import ARMS
from benchmarks.study.compare.figures import plot_comparison

FAMILY = "qwen3_moe"


def draw(results: Path) -> list[Path]:
    """Draw the first seed of each such cell into a folder of `results` with the cell's name; levers appear only in the table."""
    drawn: list[Path] = []
    for path in sorted(results.glob("*-0.json")):
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result["cell"].split("/")[1] == FAMILY:
            rows = [row for row in result["rows"] if row["arm"] in ARMS]
            shown = {"name": result["cell"], "rows": rows, "target_loss": rows[0]["curve"][-1]["loss"]}
            drawn += plot_comparison(shown, results / result["cell"].replace("/", "-"))
    return drawn
