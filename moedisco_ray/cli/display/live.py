"""The live view on a terminal: time, dollars, stages, a progress bar per training unit, and cluster sizes."""

from __future__ import annotations

import threading
import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moedisco_ray.cli.display.formatting import count, percent
from moedisco_ray.cli.display.state import RunState, StageState, UnitState
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.printable import one_line
from moedisco_ray.core.records.bill import format_seconds
from moedisco_ray.core.records.events import Event
from moedisco_ray.plan import Plan

_ICONS = {
    "waiting": ("○", "dim"),
    "running": ("●", "bold cyan"),
    "done": ("✓", "green"),
    "reused": ("✓", "dim"),
    "failed": ("✗", "red"),
}
_MOST_UNITS = 12
_MOST_NOTICES = 3


class LiveView:
    """A view that is redrawn four times a second from the first event to `close`.

    Args:
        console: A terminal.
        config: The run's configuration, from which the cost so far is computed. Without it, the view shows no cost.
        plan: The run's plan, from which the remaining time is estimated. Without it, the view shows no remaining time.
    """

    def __init__(self, console: Console, config: RunConfig | None = None, plan: Plan | None = None) -> None:
        self._state = RunState(config, plan)
        # Events come from the pipeline's thread, redraws from rich's.
        self._lock = threading.Lock()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __call__(self, event: Event) -> None:
        with self._lock:
            self._state.update(event)
        self._live.start()

    def close(self) -> None:
        """Draw the last state and release the terminal."""
        if self._live.is_started:
            self._live.stop()

    def _render(self) -> RenderableType:
        with self._lock:
            return render(self._state, time.time())


def render(state: RunState, now: float) -> RenderableType:
    """The whole view at one moment.

    Args:
        state: The run so far.
        now: Current time, in seconds since the epoch.
    """
    parts: list[RenderableType] = [_heading(state, now), _stage_list(state, now)]
    units = {name: unit for name, unit in state.units.items() if unit.stage == state.current}
    if units:
        parts += [Text(), _unit_table(units)]
    if state.cluster_tokens:
        parts += [Text(), cluster_bars(state.cluster_tokens, state.cluster_documents)]
    if state.notices:
        parts.append(Text())
    parts += [
        Text(f"! {one_line(notice)}", style="yellow", overflow="fold") for notice in state.notices[-_MOST_NOTICES:]
    ]
    return Group(*parts)


def cluster_bars(tokens: list[int], documents: list[int]) -> RenderableType:
    """One horizontal bar per cluster; its length is the cluster's number of tokens."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(width=30)
    table.add_column(justify="right")
    table.add_column(justify="right", style="dim")
    table.add_column(justify="right", style="dim")
    for cluster, size in enumerate(tokens):
        bar = ProgressBar(total=max(1, *tokens), completed=size, width=30, complete_style="blue", finished_style="blue")
        held = f"{documents[cluster]:,} documents" if cluster < len(documents) else ""
        table.add_row(f"cluster {cluster}", bar, f"{count(size)} tokens", percent(size / max(1, sum(tokens))), held)
    return table


def _heading(state: RunState, now: float) -> RenderableType:
    left, dollars = state.seconds_left(now), state.dollars()
    figures = []
    if state.starting:
        figures.append("starts Ray")
    elif left:
        figures.append(f"about {format_seconds(left)} left")
    if dollars is not None:
        figures.append(f"{dollars} so far")
    heading = Text.assemble(
        (one_line(state.name), "bold"), (one_line(f"  {state.directory}") if state.directory else "", "dim")
    )
    return Group(heading, Text(", ".join(figures))) if figures else heading


def _stage_list(state: RunState, now: float) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=1)
    table.add_column(min_width=10)
    table.add_column(justify="right", min_width=11)
    table.add_column(style="dim")
    for name, stage in state.stages.items():
        icon, style = _ICONS[stage.status]
        losses = [unit.loss for unit in state.units.values() if unit.stage == name and unit.loss is not None]
        activity = stage.activity if stage.status == "running" else ""
        detail = f"loss {sum(losses) / len(losses):.3f}" if losses else activity
        table.add_row(Text(icon, style), Text(name, style), _seconds(stage, now), detail)
    return table


def _seconds(stage: StageState, now: float) -> Text:
    match stage.status:
        case "running":
            return Text(format_seconds(max(0.0, now - stage.started)))
        case "done" | "failed":
            return Text(format_seconds(stage.seconds))
        case "reused":
            return Text("reused", "dim")
        case "waiting":
            return Text()


def _unit_table(units: dict[str, UnitState]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right", "right", "right", "right", "right"):
        table.add_column(justify=justify)
    for name, unit in list(units.items())[:_MOST_UNITS]:
        table.add_row(
            Text(name, "dim" if unit.done == 1 else ""),
            ProgressBar(total=1.0, completed=unit.done, width=30),
            f"{unit.step}/{unit.steps}",
            "" if unit.loss is None else f"loss {unit.loss:.3f}",
            f"{count(unit.tokens_per_second)} tokens/s" if unit.tokens_per_second else "",
            "" if unit.mfu is None else f"{percent(unit.mfu)} MFU",
            _time_left(unit),
        )
    if len(units) > _MOST_UNITS:
        table.add_row(Text(f"and {len(units) - _MOST_UNITS} more", "dim"))
    return table


def _time_left(unit: UnitState) -> str:
    left = unit.seconds_left
    if left is None:
        return ""
    return "done" if unit.done == 1 else f"{format_seconds(left)} left"
