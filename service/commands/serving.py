"""The command that is the service."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError

from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import ConfigError
from service.commands.apart import OWN_ADDRESS, say_how_to_sign_in, sign_in_link, start_apart
from service.commands.connection import SERVICE_PANEL
from service.commands.output import say

if TYPE_CHECKING:
    from service.serve import Announcement

commands = typer.Typer()

StateDir = Annotated[Path | None, typer.Option(help="Holds what the service remembers.", show_default="~/.local/state/moedisco")]


@commands.command(rich_help_panel=SERVICE_PANEL)
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="0: any that is free.", show_default="8300")] = None,
    ray_address: Annotated[str | None, typer.Option(
        help="Where a running Ray cluster takes jobs, such as http://HEAD:8265; left out: a local one is started.")] = None,
    dashboard_url: Annotated[str | None, typer.Option(
        help="URL at which the service reaches the Ray dashboard, when it differs from --ray-address.")] = None,
    database_url: Annotated[str | None, typer.Option(
        envvar="MOEDISCO_DATABASE_URL", help="sqlite:///FILE or postgresql+psycopg://...; left out: SQLite in the state directory.",
    )] = None,
    state_dir: StateDir = None,
    admin_token_file: Annotated[Path | None, typer.Option(
        envvar="MOEDISCO_ADMIN_TOKEN_FILE", metavar="FILE", show_default="admin-token in the state directory",
        help="The first administrator's token: read from this file, or made and written there.")] = None,
    driver_user: Annotated[str | None, typer.Option(
        metavar="NAME", show_default="this user", help="User that a local Ray and its drivers run as; needs a service of root.",
    )] = None,
    input_root: Annotated[list[str] | None, typer.Option(
        help="A directory or s3://BUCKET/PREFIX that runs may read; may be given more than once.", show_default="."),
    ] = None,
    output_root: Annotated[list[Path] | None, typer.Option(
        help="A directory that holds runs, the first by default; may be given more than once.", show_default="runs")] = None,
    storage_root: Annotated[list[str] | None, typer.Option(
        help="A directory or s3://BUCKET/PREFIX that checkpoint.storage may name; may be given more than once.",
        show_default="run directories only")] = None,
    max_active_runs: Annotated[int | None, typer.Option(help="Runs that go on at once.", show_default="4")] = None,
    policies: Annotated[Path | None, typer.Option(
        metavar="FILE", envvar="MOEDISCO_POLICIES",
        help="YAML file with prices and limits of every owner; while it is given, they cannot be changed otherwise.")] = None,
    public_url: Annotated[str | None, typer.Option(help="Under which browsers and drivers reach the service.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Of one token.", show_default="1200")] = None,
    allow_private_webhooks: Annotated[
        bool, typer.Option("--allow-private-webhooks", help="Webhooks may go to private addresses.")] = False,
    forwarded_allow_ips: Annotated[
        str | None, typer.Option(metavar="ADDRESSES", help="Proxies whose X-Forwarded headers are believed.")] = None,
    log_format: Annotated[Literal["console", "json"] | None, typer.Option(show_default="console")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Go on in the background; `moedisco stop` ends it.")] = False,
) -> None:
    """Run the service: REST, the page, and the queue of runs. Ctrl-C ends it; runs go on and are taken up again."""
    given: dict[str, Any] = {
        "host": host, "port": port, "ray_address": ray_address, "dashboard_url": dashboard_url, "database_url": database_url,
        "state_dir": state_dir or _state_dir(), "admin_token_file": admin_token_file, "driver_user": driver_user,
        "input_roots": input_root or None, "output_roots": output_root or None, "storage_roots": storage_root or None,
        "max_active_runs": max_active_runs, "policies": policies, "public_url": public_url,
        "requests_per_minute": requests_per_minute, "allow_private_webhooks": allow_private_webhooks or None,
        "forwarded_allow_ips": forwarded_allow_ips, "log_format": log_format}
    settings_of = importlib.import_module("service.settings").Settings
    try:
        settings = settings_of.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise _mistake(error) from error
    if detach:
        address = start_apart(settings.state_dir, [word for word in sys.argv[2:] if word != "--detach"])
        say(f"MoE-DisCo is at {address.url}")
        say_how_to_sign_in(address, settings.admin_token_path)
        return
    tell = functools.partial(announce, settings.state_dir)
    if importlib.import_module("service.serve").serve(settings, tell):
        say("Ray and the runs under way go on; the next `moedisco serve` takes them up")


@commands.command(rich_help_panel=SERVICE_PANEL)
def stop(state_dir: StateDir = None) -> None:
    """End the service of a state directory, and its local Ray unless runs are under way."""
    ended = importlib.import_module("service.process").end(state_dir or _state_dir())
    say("The service has ended" if ended else "No service uses this state directory")


@commands.command("sign-in", rich_help_panel=SERVICE_PANEL)
def sign_in() -> None:
    """Print a link that signs a browser in to the service's page, once, within ten minutes."""
    find_address = importlib.import_module("service.client.address").find_address
    say(sign_in_link(find_address()))


def announce(state_dir: Path, started: Announcement) -> None:
    """Tell where the service is, and leave its address for this user's own commands."""
    client = importlib.import_module("service.client")
    # Of the services that this user has started, each keeps its own token; commands go to the one that was started last.
    own = state_dir / OWN_ADDRESS
    saved = client.load_address(own)
    address = client.Address(started.url, started.token or (saved.token if saved is not None else None))
    client.save_address(address, own)
    path = client.save_address(address)
    say(f"MoE-DisCo is at {started.url}; commands of this user find it by {path}")
    say(f"The Ray dashboard, for administrators: {started.url}/ray/")
    say_how_to_sign_in(address, started.token_file, started.sign_in_code)


def _state_dir() -> Path:
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "moedisco"


def _mistake(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    option = str(first["loc"][0]).replace("_", "-").replace("roots", "root")
    value = first["input"]
    return ConfigError(f"--{option}", value if isinstance(value, str | int | float) else str(value), plain_words(first))
