"""How a run, a finished run and a plan look: a live view on a terminal, plain lines in a pipe, JSON for programs."""

from __future__ import annotations

from typing import Protocol

from rich.console import Console

from moedisco_ray.cli.display.live import LiveView
from moedisco_ray.cli.display.plain import JsonLines, PlainLines
from moedisco_ray.cli.display.plan import cluster_view, plan_view
from moedisco_ray.cli.display.show import evaluation_view, report_view
from moedisco_ray.core.events import Event

__all__ = [
    "JsonLines", "LiveView", "PlainLines", "View", "cluster_view", "evaluation_view", "listener_for", "plan_view",
    "report_view",
]


class View(Protocol):
    """Shows events as they come; `close` leaves the terminal as it was."""

    def __call__(self, event: Event) -> None:
        """Take an event."""

    def close(self) -> None:
        """Take no more."""


def listener_for(console: Console, json: bool) -> View:
    """The view that suits where the output goes.

    Args:
        console: The output.
        json: Whether events were asked for as JSON, whatever the output is.
    """
    if json:
        return JsonLines(console.file)
    return LiveView(console) if console.is_terminal else PlainLines(console.file)
