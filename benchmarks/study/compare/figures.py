"""Plots the held-out loss of all arms over tokens, dollars and hours, one figure for each axis."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.study.compare.records import Budget, Point, Row
from moedisco_ray.cli.figures import INK, PALETTE, STYLE, blank_figure
from moedisco_ray.core.records import Record

Axis = Literal["tokens", "dollars", "hours"]
_AXES: Mapping[Axis, tuple[Budget, str]] = {
    "tokens": ("tokens", "tokens trained on"),
    "dollars": ("dollars", "planned dollars"),
    "hours": ("dollars", "planned hours"),
}
"""Budget of the runs to draw, and axis label, for each x-axis."""
_BUDGETS = {budget for budget, _ in _AXES.values()}
_DASHES = {"seed": (2, 1.5), "finetune": (None, None)}


class Line(Record):
    """Held-out loss of one model of a run, column by column."""

    stage: str
    """`seed` or `finetune`."""
    tokens: tuple[int, ...]
    dollars: tuple[float, ...]
    hours: tuple[float, ...]
    loss: tuple[float, ...]


class RunLines(Record):
    """The lines of one run."""

    arm: str
    budget: Budget
    lines: tuple[Line, ...]


class Drawing(Record):
    """What the figures of a comparison show."""

    name: str
    target_loss: float
    """Joint training's last held-out loss."""
    runs: tuple[RunLines, ...]
    """Runs, joint training first."""


def drawing(name: str, target_loss: float, rows: Iterable[Row]) -> Drawing:
    """What the figures of a comparison show.

    Args:
        name: Title of the figures.
        target_loss: Joint training's last held-out loss.
        rows: Rows of `compare.json`, joint training first.
    """
    runs = []
    for row in rows:
        if row.budget in _BUDGETS:
            lines = tuple(_line(stage, tuple(points)) for stage, points in itertools.groupby(row.curve, lambda point: point.stage))
            runs.append(RunLines(arm=row.arm, budget=row.budget, lines=lines))
    return Drawing(name=name, target_loss=target_loss, runs=tuple(runs))


def _line(stage: str, points: Sequence[Point]) -> Line:
    return Line(
        stage=stage, tokens=tuple(point.tokens for point in points), dollars=tuple(point.dollars for point in points),
        hours=tuple(point.hours for point in points), loss=tuple(point.loss for point in points))


def plot_comparison(drawn: Drawing, folder: Path) -> list[Path]:
    """Draw `loss-over-tokens.png`, `-dollars` and `-hours`.

    Args:
        drawn: Lines to draw.
        folder: Output folder; created if absent.

    Returns:
        Paths of the PNG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = figure_paths(folder)
    with mpl.rc_context(STYLE):
        for axis, path in zip(_AXES, paths, strict=True):
            draw_losses(drawn, axis).savefig(path, dpi=150, bbox_inches="tight", facecolor="white")
    return paths


def figure_paths(folder: Path) -> list[Path]:
    """Paths of a comparison's figures in a folder."""
    return [folder / f"loss-over-{axis}.png" for axis in _AXES]


def draw_losses(drawn: Drawing, axis: Axis) -> Figure:
    """Draw one line per arm: dashed for the seed, a gap while sub-models train, solid for the whole model."""
    budget, label = _AXES[axis]
    joint = drawn.runs[0]
    numbers = {arm: number for number, arm in enumerate(dict.fromkeys(run.arm for run in drawn.runs[1:]))}
    runs = [joint, *(run for run in drawn.runs[1:] if run.budget == budget)]
    figure = blank_figure(6.4, 4.2)
    axes = figure.subplots()
    ends = []
    for run in runs:
        # An arm has the same colour in all figures of a comparison, even if some arms have no run in one of them.
        colour = INK if run is joint else PALETTE[numbers[run.arm] % len(PALETTE)]
        for line in run.lines:
            axes.plot(
                getattr(line, axis), line.loss, color=colour, dashes=_DASHES[line.stage], zorder=3 if run is joint else 2,
                marker="o" if len(line.loss) == 1 else None, markersize=5)
        last = run.lines[-1]
        ends.append((getattr(last, axis)[-1], last.loss[-1], run.arm, colour))
    axes.axhline(drawn.target_loss, color="#999999", linewidth=1, linestyle=":")
    # The first losses are far above the range of interest.
    low = min(loss for run in runs for line in run.lines if line.stage == "finetune" for loss in line.loss)
    high = joint.lines[0].loss[0]
    axes.set_ylim(low - 0.05 * (high - low), high)
    axes.set(xlabel=label, ylabel="held-out loss (nats per token)")
    axes.set_title(f"{drawn.name}: at equal {budget}", loc="left")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    label_ends(axes, ends)
    return figure


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Label each curve to the right of the panel at the height of its end; labels that would overlap are moved apart."""
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
