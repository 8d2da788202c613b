"""Held-out losses of models on texts, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from moedisco_ray.cli.display.formatting import PlainTable
from moedisco_ray.core.store.locations import parent


def losses_view(
    losses: Sequence[Mapping[str, Any]], texts: Sequence[str], *, perplexity: bool = False
) -> RenderableType:
    """The held-out losses, or perplexities, of models on some texts, from `merge_models` or `choose_experts`."""
    title = "held-out perplexity" if perplexity else "held-out loss"
    table = PlainTable(title, *(parent(text)[1] for text in texts), "mixture")
    for row in losses:
        if row is losses[-1]:
            table.add_section()
        shown = (*row["texts"], row["mixture"])
        table.add_row(row["model"], *(f"{math.exp(loss):.4g}" if perplexity else f"{loss:.4f}" for loss in shown))
    return table
