"""The whole method in minutes, the way a team lives with it: a service, a run over REST, its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from moedisco_ray.cli.app import Overrides
from moedisco_ray.core.config import check_config
from moedisco_ray.core.config.load import apply_override
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.plan.machine import measured_machine
from service.commands.apart import say_how_to_sign_in, start_apart
from service.commands.connection import SERVICE_PANEL, connected
from service.commands.output import say
from service.commands.watching import look_on

commands = typer.Typer()


@commands.command(rich_help_panel=SERVICE_PANEL)
def demo(
    directory: Annotated[Path, typer.Argument(metavar="[DIRECTORY]", help="Where the service and its runs live.")] = Path("runs"),
    overrides: Overrides = None,
) -> None:
    """Start a service, hand it a small run on text that every installation has, watch it, and download the model.

    The service goes on afterwards, so that its page can be looked at; `moedisco stop` ends it.
    """
    raw = yaml.safe_load(preset_text("demo"))
    for override in overrides or ():
        apply_override(raw, override)
    config = check_config(raw)
    measured_machine(config, here=True)     # so that the service's estimate is about this machine
    state_dir = directory / "service"
    token_file = state_dir.resolve() / "admin-token"
    address = start_apart(state_dir, ["--port=0", f"--output-root={directory.resolve()}", f"--admin-token-file={token_file}"])
    with connected(outlasts_restarts=True) as client:
        run = client.submit(config)
        look_on(client, run.id, as_json=False)
        model = client.download(run.id, directory / f"model-{run.id}")
    say(f"The model is in {model}")
    say_how_to_sign_in(address, token_file)
    say(f"The service goes on; to end it: moedisco stop --state-dir {state_dir}")
