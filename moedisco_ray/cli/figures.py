"""The figures of a run: loss over tokens, clusters in two dimensions, expert load."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from moedisco_ray.core.printable import one_line
from moedisco_ray.core.records.run_record import Curve, RunReport
from moedisco_ray.core.records.summaries import ClusterMap, RouterRecord
from moedisco_ray.core.stages import OF_CLUSTERS, TRAINING

# Okabe and Ito's palette, whose colours differ under every kind of colour blindness (jfly.uni-koeln.de/color).
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B7A900", "#555555")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#333333"
STYLE: dict[str, Any] = {
    "text.parse_math": False,  # a name may contain dollar signs
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#E8E8E8",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.dpi": 150,
}


def plot(report: RunReport, folder: Path) -> list[Path]:
    """Draw every figure that a run's report has numbers for.

    Args:
        report: Report of a run, finished or not.
        folder: Folder of the PNG files; created if there is something to draw.

    Returns:
        The PNG files.
    """
    with mpl.rc_context(STYLE):
        drawn = {
            "loss.png": draw_loss(report.curves, report.held_out),
            "clusters.png": draw_clusters(report.clusters.map),
            "experts.png": draw_experts(report.evaluation.routers),
        }
    written = []
    for name, figure in drawn.items():
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)  # the cache of a run at a URI may hold nothing yet
            figure.savefig(folder / name, dpi=150, bbox_inches="tight", facecolor="white")
            written.append(folder / name)
    return written


def draw_loss(curves: Mapping[str, Curve], held_out: Mapping[str, Curve] | None = None) -> Figure | None:
    """Draw the loss against the trained tokens, from seed to fine-tune. All sub-models start where the seed ends.

    Joint training has no curve here: a comparison stores only its result in words, as `comparison.json` in the run
    directory.

    Args:
        curves: Training loss; drawn faint, under its running mean.
        held_out: Held-out loss of the units that measured it (`evaluation.every_tokens`); drawn as dots.

    Returns:
        The figure; None without curves.
    """
    curves = {
        unit: curve
        for stage in TRAINING
        for unit, curve in sorted(curves.items(), key=lambda item: _number_of(item[0]))
        if curve.stage == stage.name
    }
    if not curves:
        return None
    starts = _starts(curves)
    figure = blank_figure(8.4, 4.4)
    axes = figure.subplots()
    for unit, curve in curves.items():
        colour = PALETTE[_number_of(unit) % len(PALETTE)] if curve.stage in OF_CLUSTERS else INK
        x = [starts[curve.stage] + tokens for tokens in curve.tokens]
        smooth = running_mean(curve.loss, max(1, len(x) // 25))
        axes.plot(x, curve.loss, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(x, smooth, color=colour, label=f"{one_line(unit)}  {smooth[-1]:.2f}", zorder=3)
        if held_out and unit in held_out:
            x, losses = [starts[curve.stage] + tokens for tokens in held_out[unit].tokens], held_out[unit].loss
            axes.plot(
                x,
                losses,
                color=colour,
                linestyle=":",
                linewidth=1,
                marker="o",
                markersize=4.5,
                markerfacecolor="white",
                zorder=4,
                markevery=max(1, len(x) // 40),
                label=f"{one_line(unit)}, held out  {losses[-1]:.2f}",
            )
    whole = next((starts[stage.name] for stage in TRAINING if stage.trains_whole and stage.name in starts), None)
    if whole is not None and OF_CLUSTERS & starts.keys():
        axes.axvline(whole, color="#777777", linewidth=1, linestyle="--")
        axes.annotate(
            "merge",
            (whole, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color="#777777",
            fontsize=9,
        )
    axes.set_title("Loss from seed to fine-tune", loc="left")
    axes.set(
        xlabel="tokens that one model trains on (sub-models side by side)",
        ylabel="loss (nats per token)",
        xlim=(0, None),
    )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        fontsize=9,
        ncols=math.ceil(len(axes.get_legend_handles_labels()[0]) / 16),
        title="last loss",
        title_fontsize=9,
        alignment="left",
    )
    return figure


def _starts(curves: Mapping[str, Curve]) -> dict[str | None, int]:
    """Position on the token axis at which each stage with curves starts."""
    starts: dict[str | None, int] = {}
    end = 0
    for stage in TRAINING:
        lengths = [curve.tokens[-1] for curve in curves.values() if curve.stage == stage.name]
        if lengths:
            starts[stage.name] = end
            end += max(lengths)
    return starts


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and up to `reach` neighbours on each side.

    Near the start the window shrinks on both sides, so that the high first losses do not raise later means. At the end
    it shrinks on one side only, so that the last mean is not a single noisy value.
    """
    means = []
    for i in range(len(values)):
        near = min(reach, i)
        window = values[i - near : i + near + 1]
        means.append(sum(window) / len(window))
    return means


def draw_clusters(points: ClusterMap) -> Figure | None:
    """A sample of documents, projected onto the first two principal directions of their vectors.

    The first panel is coloured by cluster. If there are several sources, a second panel is coloured by source. Sources
    are in the order of the cluster that holds most of their documents, so that a source has the colour of the cluster
    that corresponds to it.

    Args:
        points: Coordinates, cluster and source of each document.

    Returns:
        The figure; None without points.
    """
    if not points.x:
        return None
    views: dict[str, Sequence[str]] = {"Clusters": [f"cluster {cluster}" for cluster in points.cluster]}
    if len(set(points.source)) > 1:
        views["Sources"] = points.source
    figure = blank_figure(5.6 * len(views), 4.4)
    panels = figure.subplots(1, len(views), squeeze=False)[0]
    for axes, (title, labels) in zip(panels, views.items(), strict=True):
        _scatter(axes, points.x, points.y, _by_main_cluster(labels, points.cluster))
        axes.set_title(title, loc="left")
    return figure


def draw_experts(routers: Sequence[RouterRecord]) -> Figure | None:
    """Share of the router's choices that each expert gets, per layer, compared with an even share.

    Args:
        routers: One record per layer, whose `load` has the share of each expert.

    Returns:
        The figure; None without routers.
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
    """An empty figure; width and height in inches."""
    # pyplot would keep every figure in memory and may look for a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _number_of(unit: str) -> int:
    suffix = unit.rpartition("-")[2]
    return int(suffix) if suffix.isdigit() else 0


def _by_main_cluster(labels: Sequence[str], clusters: Sequence[int]) -> dict[str, list[int]]:
    """Documents by label.

    Labels are sorted by the number of the cluster that holds most of their documents, then by name.
    """
    documents: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        documents.setdefault(label, []).append(i)

    def main_cluster(label: str) -> int:
        return Counter(clusters[i] for i in documents[label]).most_common(1)[0][0]

    return {label: documents[label] for label in sorted(documents, key=lambda label: (main_cluster(label), label))}


def _scatter(axes: Axes, x: Sequence[float], y: Sequence[float], documents: Mapping[str, Sequence[int]]) -> None:
    size = min(24.0, max(5.0, 9000 / len(x)))
    for number, (label, chosen) in enumerate(documents.items()):
        # Once every colour is used, start over with the next marker.
        axes.scatter(
            [x[i] for i in chosen],
            [y[i] for i in chosen],
            s=size,
            alpha=0.65,
            linewidths=0,
            color=PALETTE[number % len(PALETTE)],
            marker=_MARKERS[number // len(PALETTE) % len(_MARKERS)],
            label=f"{one_line(label)}  ({len(chosen)})",
        )
    axes.grid(visible=False)
    axes.set(xticks=[], yticks=[], xlabel="first principal direction", ylabel="second principal direction")
    columns = math.ceil(len(documents) / 20)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns, markerscale=1.8, handletextpad=0.2, fontsize=9
    )
