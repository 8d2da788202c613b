"""Views of a plan, of a run and of its report.

A run is shown live on a terminal, as lines in a pipe, as JSON for programs.
"""

from __future__ import annotations

from typing import Protocol

from rich.console import Console

from moedisco_ray.cli.display.live import LiveView
from moedisco_ray.cli.display.plain import JsonLines, PlainLines
from moedisco_ray.cli.display.show import evaluation_view, next_commands, report_view
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.printable import printed
from moedisco_ray.core.records.events import Event
from moedisco_ray.plan import Plan

__all__ = [
    "JsonLines",
    "LiveView",
    "PlainLines",
    "View",
    "evaluation_view",
    "listener_for",
    "next_commands",
    "report_view",
]


class View(Protocol):
    """Shows events as they arrive."""

    def __call__(self, event: Event) -> None:
        """Handle an event."""

    def close(self) -> None:
        """Show the last state and restore the terminal."""


def listener_for(console: Console, json: bool, config: RunConfig | None = None, plan: Plan | None = None) -> View:
    """The view of a run that suits the output.

    Args:
        console: Console to write to.
        json: Write JSON lines, even to a terminal.
        config: The run's configuration, from which a live view computes the cost so far; None if unknown.
        plan: The run's plan, from which a live view estimates the remaining time; None if unknown.
    """
    if json:
        return JsonLines(printed(console.file))
    return LiveView(console, config, plan) if console.is_terminal else PlainLines(printed(console.file))
