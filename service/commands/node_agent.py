"""The command that runs on every spot node: it drains the node when the cloud takes it back."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.connection import SERVICE_PANEL
from service.commands.output import say

if TYPE_CHECKING:
    from moedisco_ray.execution.node_agent import Provider

commands = typer.Typer()


@commands.command(rich_help_panel=SERVICE_PANEL)
def node_agent(
    provider: Annotated[
        str,
        typer.Option(
            metavar="CLOUD",
            help="Cloud that owns this machine, such as aws; auto: the one whose metadata service answers.",
        ),
    ] = "auto",
    metadata_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="URL of the cloud's metadata service.", show_default="http://169.254.169.254"),
    ] = None,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="Poll interval, in seconds.")] = 5.0,
    node_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Ray node to drain.", show_default="all on this machine")
    ] = None,
    leave_on_risk: Annotated[
        bool,
        typer.Option(
            "--leave-on-risk", help="Also drain at EC2's rebalance recommendation, an early warning without a deadline."
        ),
    ] = False,
) -> None:
    """Watch for the cloud's interruption notice for this spot machine and drain its Ray node in time.

    Runs until stopped.
    """
    from moedisco_ray.execution import node_agent as agent

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    client = (
        _find_provider(metadata_url, interval, stop)
        if provider == "auto"
        else agent.make_provider(provider, metadata_url)
    )
    if client is not None:
        agent.watch(client, agent.Drainer(node_id), interval=interval, stop=stop, log=say, leave_on_risk=leave_on_risk)


def _find_provider(metadata_url: str | None, interval: float, stop: threading.Event) -> Provider | None:
    """Wait until a cloud's metadata service answers, and return that cloud; None if the command is stopped first."""
    from moedisco_ray.execution.node_agent import find_provider

    client = find_provider(metadata_url)
    if client is None:
        say("no cloud's metadata service answers yet")
    while client is None and not stop.wait(interval):
        client = find_provider(metadata_url)
    return client
