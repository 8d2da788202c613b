"""A comparison as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from moedisco_ray.display.tables import plain_table
from moedisco_ray.display.words import count
from moedisco_ray.report import format_dollars, format_seconds

_BUDGETS = {"tokens": "At as many tokens", "dollars": "For as many planned dollars"}


def compare_view(result: Mapping[str, Any]) -> RenderableType:
    """One table per budget; joint training is the first row of each."""
    joint = result["rows"][0]
    parts: list[RenderableType] = []
    for budget, title in _BUDGETS.items():
        rows = [row for row in result["rows"][1:] if row["budget"] == budget]
        if not rows:
            continue
        table = plain_table(
            "", "tokens", "FLOP", "planned $", "planned time", "metered $", "loss", "perplexity", "against joint", "$ to its loss")
        for row in (joint, *rows):
            table.add_row(
                row["title"], count(row["tokens"]), f"{row['flops']:.2e}", format_dollars(row["dollars"]),
                format_seconds(row["hours"] * 3600), format_dollars(row["metered_dollars"]), f"{row['loss']:.4f}",
                f"{row['perplexity']:.2f}", _change(row["perplexity"], joint["perplexity"]),
                _change(row["dollars_to_target"], joint["dollars"]))
        parts += [Text(title, style="bold"), table, Text()]
    parts.append(Text(
        f"$ to its loss: planned dollars until the held-out loss first was joint training's last, {result['target_loss']:.4f}, "
        "against joint training's dollars. One seed: repeat with others before concluding.", style="dim"))
    return Group(*parts)


def _change(value: float | None, reference: float) -> str:
    return "never" if value is None else f"{100 * (value / reference - 1):+.1f} %"
