"""Draws the loss of the main ways to train over their dollars, from the published pieces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.grid.pieces import OURS
from benchmarks.study.grid.records import Figures
from benchmarks.study.grid.section import headline_cell
from benchmarks.study.grid.summary import JOINT_LOW
from moedisco_ray.cli.figures import INK, PALETTE, STYLE, blank_figure

_LINES = {
    REFERENCE: ("whole model on an A100", INK),
    JOINT_LOW: ("whole model on RTX 4090s", PALETTE[2]),
    OURS: ("parts on RTX 4090s, then an A100", PALETTE[0]),
    "expert-upcycling": ("grown on RTX 4090s, then an A100", PALETTE[1]),
}
"""Name and colour of each line, by arm."""


def write_picture(path: Path) -> None:
    """Write the picture of the README as a PNG file, from the cell with the largest budget."""
    with mpl.rc_context(STYLE):
        draw(headline_cell()).savefig(path, dpi=150, bbox_inches="tight", facecolor="white")


def draw(found: Sequence[Figures]) -> Figure:
    """Draw one line per arm through its budgets: held-out loss over dollars at the paper's prices.

    Args:
        found: The figures of one cell, with all budgets.
    """
    least = min(each.budget_tokens for each in found)
    figure = blank_figure(6.4, 3.4)
    axes = figure.subplots()
    for arm, (name, colour) in _LINES.items():
        points = sorted((each for each in found if each.arm == arm), key=lambda each: each.budget_tokens)
        dollars = [(each.dollars_equal_tokens.paper or 0) * each.budget_tokens / least for each in points]
        axes.plot(dollars, [each.loss for each in points], color=colour, marker="o", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel=f"dollars; {least / 1e6:.2f} million tokens on one A100 are 1", ylabel="held-out loss (nats per token)"
    )
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9)
    return figure
