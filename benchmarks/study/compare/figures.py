"""Plots the held-out loss of all arms over tokens, dollars and hours, one figure for each axis."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.study.compare.records import Budget, Comparison
from moedisco_ray.cli.figures import INK, PALETTE, STYLE, blank_figure

Axis = Literal["tokens", "dollars", "hours"]
_AXES: Mapping[Axis, tuple[Budget, str]] = {
    "tokens": ("tokens", "tokens trained on"),
    "dollars": ("dollars", "planned dollars"),
    "hours": ("dollars", "planned hours"),
}
"""Budget of the runs to draw, and axis label, for each x-axis."""
_BUDGETS = {budget for budget, _ in _AXES.values()}
_DASHES = {"seed": (2, 1.5), "finetune": (None, None)}


def plot_comparison(compared: Comparison, folder: Path) -> list[Path]:
    """Draw `loss-over-tokens.png`, `-dollars` and `-hours`.

    Args:
        compared: The comparison.
        folder: Output folder; created if absent.

    Returns:
        Paths of the PNG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"loss-over-{axis}.png" for axis in _AXES]
    with mpl.rc_context(STYLE):
        for axis, path in zip(_AXES, paths, strict=True):
            draw_losses(compared, axis).savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    return paths


def draw_losses(compared: Comparison, axis: Axis) -> Figure:
    """Draw one line per arm: dashed for the seed, a gap while sub-models train, solid for the whole model."""
    budget, label = _AXES[axis]
    joint, *others = compared.rows
    drawn = [row for row in others if row.budget in _BUDGETS]
    arms = dict.fromkeys(row.arm for row in drawn)
    numbers = {arm: number for number, arm in enumerate(arms)}
    rows = [joint, *(row for row in drawn if row.budget == budget)]
    figure = blank_figure(6.4, 4.2)
    axes = figure.subplots()
    ends = []
    for row in rows:
        # An arm has the same colour in all figures of a comparison, even if some arms have no run in one of them.
        colour = INK if row is joint else PALETTE[numbers[row.arm] % len(PALETTE)]
        for stage, points in itertools.groupby(row.curve, lambda point: point.stage):
            line = list(points)
            axes.plot(
                [getattr(point, axis) for point in line],
                [point.loss for point in line],
                color=colour,
                dashes=_DASHES[stage],
                zorder=3 if row is joint else 2,
                marker="o" if len(line) == 1 else None,
                markersize=5,
            )
        last = row.curve[-1]
        ends.append((getattr(last, axis), last.loss, row.arm, colour))
    axes.axhline(compared.target_loss, color="#999999", linewidth=1, linestyle=":")
    # The first losses are far above the range of interest.
    low = min(point.loss for row in rows for point in row.curve if point.stage == "finetune")
    high = joint.curve[0].loss
    axes.set_ylim(low - 0.05 * (high - low), high)
    axes.set(xlabel=label, ylabel="held-out loss (nats per token)")
    axes.set_title(f"{compared.name}: at equal {budget}", loc="left")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    label_ends(axes, ends)
    return figure


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Label each curve at its end, to the right of the panel; labels that would overlap are moved apart."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end[1])
    heights = [(loss - low) / (high - low) for _, loss, _, _ in ordered]
    step = 0.06
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + step)
    excess = max(0.0, heights[-1] - 1)
    heights = [height - excess for height in heights]
    for (_, loss, unit, colour), height in zip(ordered, heights, strict=True):
        axes.text(1.02, height, f"{unit}  {loss:.2f}", transform=axes.transAxes, color=colour, va="center", fontsize=9)
