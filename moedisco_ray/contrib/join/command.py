"""Commands by which a machine outside of the cluster's network joins a low-memory pool."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from moedisco_ray.cli.console import remark, say
from moedisco_ray.core.errors import ConfigError

commands = typer.Typer()
_PANEL = "Machines that join"
TOKEN_VARIABLE = "MOEDISCO_JOIN_TOKEN"  # noqa: S105 - the name of a variable
StateDir = Annotated[
    Path, typer.Option("--state-dir", metavar="DIR", help="Directory of keys and tokens; only root may write to it.")
]
_STATE = Path("/var/lib/moedisco-join")
_MOST_MINUTES = 7 * 24 * 60


@commands.command(rich_help_panel=_PANEL)
def join(
    token: Annotated[
        str,
        typer.Argument(
            metavar="TOKEN",
            envvar=TOKEN_VARIABLE,
            help="Token from `join-token` on the head node; - reads it from standard input.",
        ),
    ],
    resource: Annotated[
        str, typer.Option(metavar="TAG", help="Ray custom resource that marks the pool to join.")
    ] = "low_mem_gpu",
    gpus: Annotated[int | None, typer.Option(min=0, help="Number of GPUs to offer.", show_default="all")] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of workers at the same time.", show_default="one per GPU")
    ] = None,
    grace: Annotated[
        float,
        typer.Option(min=0, max=3600, help="Seconds that workers get to save their state when this machine leaves."),
    ] = 60.0,
    patience: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="MINUTES",
            help="Minutes without the head after which this machine gives up.",
            show_default="never",
        ),
    ] = None,
) -> None:
    """Let this machine join a cluster's low-memory pool, through an encrypted tunnel.

    When the connection breaks, the machine joins again. Ctrl-C or SIGTERM ends it. Needs root.
    """
    from moedisco_ray.contrib.join import machine
    from moedisco_ray.contrib.join.token import JoinToken

    decoded = JoinToken.decode(sys.stdin.readline() if token == "-" else token)  # noqa: S105 - a dash
    machine.require_root()
    found = machine.count_gpus() if gpus is None else gpus
    if slots is None and not found:
        raise ConfigError("--gpus", found, "this machine has no NVIDIA GPU; pass --slots to join with CPU workers")
    offered = machine.Machine(
        tag=resource,
        slots=slots or found,
        gpus=found,
        labels={"moedisco/pool": "low_memory", "moedisco/market": "joined"},
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    machine.join(decoded, offered, stop, say, grace=grace, patience=math.inf if patience is None else 60 * patience)


@commands.command(rich_help_panel=_PANEL)
def join_token(
    minutes: Annotated[int, typer.Option(min=1, max=_MOST_MINUTES, help="Minutes for which the token is valid.")] = 60,
    count: Annotated[int, typer.Option(min=1, max=1000, help="Number of tokens, one per machine.")] = 1,
    revoke: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Print no token, but end the connection of the machine that Ray lists with this address, and admit it "
            "no longer.",
        ),
    ] = None,
    state_dir: StateDir = _STATE,
) -> None:
    """Print a token with which one machine can join the cluster.

    The token opens one connection; its machine may come back until it was away for seven days. Run this command as root
    on the head node.
    """
    from moedisco_ray.contrib.join import head

    if revoke is not None:
        head.revoke(state_dir, revoke)
        say(f"{revoke} is admitted no longer")
        return
    for _ in range(count):
        say(head.issue(state_dir, minutes).encoded())


@commands.command(rich_help_panel=_PANEL)
def join_gateway(
    public_host: Annotated[
        str, typer.Option(metavar="HOST", help="Host name or address at which machines reach this head node.")
    ],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the SSH server for joining machines.")] = 7722,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address of the Ray cluster.", show_default="the one on this machine"),
    ] = None,
    ray_token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File with the Ray cluster's token.")
    ] = None,
    network: Annotated[
        str, typer.Option(metavar="CIDR", help="IPv4 network of the tunnels; no other network may use it.")
    ] = "10.97.0.0/16",
    machines: Annotated[
        int, typer.Option(min=1, max=1000, help="Maximum number of joined machines at the same time.")
    ] = 32,
    state_dir: StateDir = _STATE,
) -> None:
    """Let machines join the cluster through this head node, by an SSH server that only opens their tunnels.

    Needs root.
    """
    from moedisco_ray.contrib.join import head
    from moedisco_ray.contrib.join.machine import own_versions
    from moedisco_ray.contrib.join.token import Offer
    from moedisco_ray.execution.node_agent.raylets import local_raylets

    if ray_address is None:
        found = local_raylets()
        if not found:
            raise ConfigError(
                "--ray-address", None, "no Ray node runs on this machine; start the head first, or give its address"
            )
        ray_address = found[0].gcs_address
    offer = Offer(ray_address=ray_address, ray_token=_ray_token(ray_token_file), versions=own_versions())
    head.prepare(state_dir, head.Gateway(host=public_host, port=port, network=network, machines=machines), offer)
    remark(f"machines join at {public_host}:{port}; `moedisco join-token` prints a token")
    head.serve(state_dir)


def _ray_token(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get("RAY_AUTH_TOKEN")
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError("--ray-token-file", str(file), f"cannot be read ({error.strerror})") from error
