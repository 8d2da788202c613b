"""Held-out loss of every arm against tokens, dollars and hours, a figure each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from moedisco_ray.cli.figures import INK, PALETTE, STYLE, blank_figure

_AXES = {
    "tokens": ("tokens", "tokens trained on"),
    "dollars": ("dollars", "planned dollars"),
    "hours": ("dollars", "planned hours"),
}
"""What is on the x-axis: the budget whose runs are drawn, and the label."""


def plot_comparison(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw `loss-over-tokens.png`, `-dollars` and `-hours`.

    Args:
        result: As in `compare.json`.
        folder: Where to; made when absent.

    Returns:
        The PNG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(STYLE):
        for axis in _AXES:
            path = folder / f"loss-over-{axis}.png"
            draw_losses(result, axis).savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
            written.append(path)
    return written


def draw_losses(result: Mapping[str, Any], axis: str) -> Figure:
    """One line per arm: dashed while its seed is trained, a gap while there are only sub-models, solid from its whole model on.

    Args:
        result: As in `compare.json`.
        axis: `tokens`, `dollars` or `hours`.
    """
    budget, label = _AXES[axis]
    joint = result["rows"][0]
    numbers = {arm: number for number, arm in enumerate(dict.fromkeys(row["arm"] for row in result["rows"][1:]))}
    rows = [joint, *(row for row in result["rows"][1:] if row["budget"] == budget)]
    figure = blank_figure(6.4, 4.2)
    axes = figure.subplots()
    ends = []
    for row in rows:
        # The same in all figures of a comparison, whichever arms have a run to show there.
        colour = INK if row is joint else PALETTE[numbers[row["arm"]] % len(PALETTE)]
        for stage, dashes in (("seed", (2, 1.5)), ("finetune", (None, None))):
            points = [point for point in row["curve"] if point["stage"] == stage]
            if points:
                axes.plot(
                    [point[axis] for point in points], [point["loss"] for point in points], color=colour, dashes=dashes,
                    zorder=3 if row is joint else 2, marker="o" if len(points) == 1 else None, markersize=5)
        last = row["curve"][-1]
        ends.append((last[axis], last["loss"], row["arm"], colour))
    axes.axhline(result["target_loss"], color="#999999", linewidth=1, linestyle=":")
    # The first looks are far above everything that is of interest.
    losses = [point["loss"] for row in rows for point in row["curve"] if point["stage"] == "finetune"]
    low = min(losses)
    axes.set_ylim(low - 0.05 * (joint["curve"][0]["loss"] - low), joint["curve"][0]["loss"])
    axes.set(xlabel=label, ylabel="held-out loss (nats per token)")
    axes.set_title(f"{result['name']}: at equal {budget}", loc="left")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    label_ends(axes, ends)
    return figure


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Name each curve to the right of the panel, at the height of its end, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end[1])
    heights = [(loss - low) / (high - low) for _, loss, _, _ in ordered]
    step = 0.06
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + step)
    excess = max(0.0, heights[-1] - 1)
    heights = [height - excess for height in heights]
    for (_, loss, unit, colour), height in zip(ordered, heights, strict=True):
        axes.text(
            1.02, height, f"{unit}  {loss:.2f}", transform=axes.transAxes, color=colour, va="center", fontsize=9)
