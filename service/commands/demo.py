"""The `demo` command: starts a service, trains a small model through its REST API, and downloads it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moedisco_ray.cli.arguments import Overrides
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.config.load import apply_override
from moedisco_ray.core.config.places import Place, ReadsFrom, is_reference, with_places
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.config.yaml_text import parse_yaml
from moedisco_ray.core.store.locations import is_uri
from moedisco_ray.plan.machine import measured_machine
from service.commands.connection import SERVICE_PANEL, connected
from service.commands.daemon import say_how_to_sign_in, start_daemon
from service.commands.output import say
from service.commands.watching import watch_run
from service.domain.path_sandbox import EMBEDDED, before_wildcard

commands = typer.Typer()


@commands.command(rich_help_panel=SERVICE_PANEL)
def demo(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIRECTORY]", help="Directory of the service and its runs.")
    ] = Path("runs"),
    overrides: Overrides = None,
) -> None:
    """Start a service, train a small model on the built-in text, and download it.

    The service keeps running afterwards, so that you can look at its page; `moedisco stop` stops it.
    """
    raw = parse_yaml(preset_text("demo"))
    for override in overrides or ():
        apply_override(raw, override)
    config, roots = with_roots(check_config(raw))
    measured_machine(config, here=True)  # measure this machine first, so that the service's estimate fits it
    state_dir = directory / "service"
    token_file = state_dir.resolve() / "admin-token"
    options = ["--port=0", f"--output-root={directory.resolve()}", f"--admin-token-file={token_file}"]
    address = start_daemon(state_dir, [*options, *(f"--input-root={root}" for root in roots)])
    with connected(outlasts_restarts=True) as client:
        run = client.submit(config)
        watch_run(client, run.id, as_json=False)
        model = client.download(run.id, directory / f"model-{run.id}")
    say(f"The model is in {model}")
    say_how_to_sign_in(address, token_file)
    say(f"The service keeps running; to stop it: moedisco stop --state-dir {state_dir}")


def with_roots(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration with absolute paths, and the input roots that let a service read what it names and no more."""
    roots: list[str] = []

    def change(place: Place) -> str | Path:
        if not isinstance(place.marker, ReadsFrom) or place.value == EMBEDDED or is_reference(place.value):
            return place.value
        if is_uri(place.value):
            roots.append(before_wildcard(str(place.value).partition("?")[0]))
            return place.value
        path = Path(place.value).absolute()
        roots.append(before_wildcard(str(path)))
        return type(place.value)(path)

    return with_places(config, change), roots
