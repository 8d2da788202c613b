"""The figures people look for: loss over tokens, clusters in two dimensions, expert load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from moedisco_ray.core.records import ClusterMap, RouterRecord
from moedisco_ray.core.run_record import Curve, RunReport

# Okabe and Ito's palette, which people with any kind of colour blindness tell apart (jfly.uni-koeln.de/color).
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B7A900", "#555555")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#333333"
STYLE: dict[str, Any] = {
    "font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999", "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": "#E8E8E8",
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.8, "figure.dpi": 150,
}


def plot(report: RunReport, folder: Path) -> list[Path]:
    """Draw what a run's report has the numbers for.

    Args:
        report: A run's, finished or not.
        folder: Gets the PNG files; it is made if there is something to draw.

    Returns:
        The PNG files.
    """
    with mpl.rc_context(STYLE):
        drawn = {
            "loss.png": draw_loss(report.curves),
            "clusters.png": draw_clusters(report.clusters.map),
            "experts.png": draw_experts(report.evaluation.routers),
        }
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            folder.mkdir(exist_ok=True)
            figure.savefig(folder / name, dpi=150, bbox_inches="tight", facecolor="white")
            written.append(folder / name)
    return written


def draw_loss(curves: Mapping[str, Curve]) -> Figure | None:
    """Training loss of every unit over its own tokens: the independent phase on the left, the fine-tune on the right.

    Args:
        curves: {unit: {stage, tokens, loss}} as in the report.

    Returns:
        The figure; None when there is no curve.
    """
    panels = {
        "Seed and sub-models": {unit: curve for unit, curve in curves.items() if curve.stage != "finetune"},
        "Fine-tune of the whole model": {unit: curve for unit, curve in curves.items() if curve.stage == "finetune"},
    }
    panels = {title: part for title, part in panels.items() if part}
    if not panels:
        return None
    figure = blank_figure(5.2 * len(panels), 3.8)
    rows = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (title, part) in zip(rows[0], panels.items(), strict=True):
        axes.set_title(title, loc="left")
        axes.set_xlabel("tokens of each model")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        ends = [_draw_curve(axes, unit, curve, i) for i, (unit, curve) in enumerate(part.items())]
        label_ends(axes, ends)
    rows[0][0].set_ylabel("training loss (nats per token)")
    return figure


def draw_clusters(points: ClusterMap) -> Figure | None:
    """A sample of documents in the plane of the first two principal directions of their vectors.

    Args:
        points: x, y, cluster and source, one entry per document. Colour tells the cluster; a second panel tells the source, where
            there are several.

    Returns:
        The figure; None when there is no point.
    """
    if not points.x:
        return None
    views: dict[str, Sequence[str]] = {"Clusters": [f"cluster {cluster}" for cluster in points.cluster]}
    if len(set(points.source)) > 1:
        views["Sources"] = points.source
    figure = blank_figure(5.6 * len(views), 4.4)
    panels = figure.subplots(1, len(views), squeeze=False)[0]
    for axes, (title, labels) in zip(panels, views.items(), strict=True):
        _scatter(axes, points.x, points.y, labels)
        axes.set_title(title, loc="left")
    return figure


def draw_experts(routers: Sequence[RouterRecord]) -> Figure | None:
    """Share of the router's choices that each expert gets, per layer, against an even share.

    Args:
        routers: {layer, load [experts]} each.

    Returns:
        The figure; None when there is no router.
    """
    if not routers:
        return None
    load = [router.load for router in routers]
    layers, experts = len(load), len(load[0])
    even = 1 / experts
    figure = blank_figure(max(4.2, 1.6 + 0.62 * experts), max(2.4, 1.4 + 0.42 * layers))
    axes = figure.subplots()
    most = max(2 * even, *(share for row in load for share in row))
    image = axes.imshow(load, cmap="PuOr_r", norm=TwoSlopeNorm(even, 0, most), aspect="auto")
    axes.grid(visible=False)
    axes.set_title("Expert load  (white: even)", loc="left")
    axes.set(xlabel="expert", ylabel="layer", xticks=range(experts), yticks=range(layers))
    axes.set_yticklabels([str(router.layer) for router in routers])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if experts <= 16:
        for layer, row in enumerate(load):
            for expert, share in enumerate(row):
                far = share > even + 0.6 * (most - even) or share < 0.4 * even
                colour = "white" if far else INK
                axes.text(expert, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=9, color=colour)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    bar = figure.colorbar(image, ax=axes, shrink=0.9, format=lambda share, _: f"{100 * share:.0f} %")
    bar.set_ticks([0, even, most])
    bar.outline.set_visible(False)
    bar.set_label("share of choices")
    return figure


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    # Not pyplot: it keeps every figure alive, and may look for a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_curve(axes: Axes, unit: str, curve: Curve, number: int) -> tuple[float, float, str, str]:
    # The seed is everybody's ancestor: ink; sub-models take the palette's colours in order.
    colour = INK if unit == "seed" else PALETTE[_number_of(unit, number) % len(PALETTE)]
    axes.plot(curve.tokens, curve.loss, color=colour, linestyle="--" if unit == "seed" else "-")
    return curve.tokens[-1], curve.loss[-1], unit, colour


def _number_of(unit: str, otherwise: int) -> int:
    suffix = unit.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else otherwise


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
    assert all(right - left >= step - 1e-9 for left, right in pairwise(heights))  # noqa: S101  # what the loop is for
    for (_, loss, unit, colour), height in zip(ordered, heights, strict=True):
        axes.text(
            1.02, height, f"{unit}  {loss:.2f}", transform=axes.transAxes, color=colour, va="center", fontsize=9)


def _scatter(axes: Axes, x: Sequence[float], y: Sequence[float], labels: Sequence[str]) -> None:
    size = min(24.0, max(5.0, 9000 / len(x)))
    for number, label in enumerate(sorted(set(labels), key=_natural)):
        chosen = [i for i, name in enumerate(labels) if name == label]
        # When the colours are used up, the next round has other markers.
        axes.scatter(
            [x[i] for i in chosen], [y[i] for i in chosen], s=size, alpha=0.65, linewidths=0,
            color=PALETTE[number % len(PALETTE)], marker=_MARKERS[number // len(PALETTE) % len(_MARKERS)],
            label=f"{label}  ({len(chosen)})")
    axes.grid(visible=False)
    axes.set(xticks=[], yticks=[], xlabel="first principal direction", ylabel="second principal direction")
    columns = math.ceil(len(set(labels)) / 20)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns, markerscale=1.8, handletextpad=0.2, fontsize=9)


def _natural(label: str) -> tuple[str, int]:
    name, _, number = label.rpartition(" ")
    return (name, int(number)) if number.isdigit() else (label, 0)
