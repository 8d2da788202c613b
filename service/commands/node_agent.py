"""The command that runs on every spot node."""

from __future__ import annotations

import importlib
import signal
import threading
from typing import Annotated, Any, Literal

import typer

from service.commands.connection import SERVICE_PANEL
from service.commands.output import say

commands = typer.Typer()


@commands.command(rich_help_panel=SERVICE_PANEL)
def node_agent(
    provider: Annotated[Literal["aws", "gcp", "azure", "auto"], typer.Option(help="Whose machine this is.")] = "auto",
    metadata_url: Annotated[str | None, typer.Option(
        metavar="URL", help="Where the cloud's metadata service is.", show_default="http://169.254.169.254")] = None,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between two looks.")] = 5.0,
    node_id: Annotated[str | None, typer.Option(
        metavar="ID", help="The Ray node to drain.", show_default="all that run on this machine")] = None,
    leave_on_risk: Annotated[bool, typer.Option(
        "--leave-on-risk", help="Drain at EC2's rebalance recommendation too, which announces no end.")] = False,
) -> None:
    """Hear the cloud's notice that this spot machine goes, and drain its Ray node in time. Runs until it is stopped."""
    # Late: `--help` and a mistake need neither.
    library = importlib.import_module("moedisco_ray.execution.node_agent")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    client = library.make_provider(provider, metadata_url) if provider != "auto" else _find(library, metadata_url, interval, stop)
    if client is not None:
        library.watch(
            client, library.Drainer(node_id), interval=interval, stop=stop, say=say, leave_on_risk=leave_on_risk)


def _find(library: Any, metadata_url: str | None, interval: float, stop: threading.Event) -> Any:
    """The cloud that this machine belongs to, as soon as its service answers; None: stopped before."""
    client = library.find_provider(metadata_url)
    if client is None:
        say("no metadata service of EC2, Compute Engine or Azure answers yet")
    while client is None and not stop.wait(interval):
        client = library.find_provider(metadata_url)
    return client
