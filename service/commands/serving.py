"""Commands that start and stop the service, and sign in to its page."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import ValidationError

from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import ConfigError
from service.commands.connection import SERVICE_PANEL
from service.commands.daemon import (
    ADDRESS_FILE,
    refuse_second,
    say_how_to_sign_in,
    say_what_is_left,
    sign_in_link,
    start_daemon,
    used_so_far,
)
from service.commands.output import say

if TYPE_CHECKING:
    from service.serve import Announcement

commands = typer.Typer()

StateDir = Annotated[
    Path | None,
    typer.Option(help="Directory of the service's database, secrets and log.", show_default="~/.local/state/moedisco"),
]


@commands.command(rich_help_panel=SERVICE_PANEL)
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 chooses a free port.", show_default="8300")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="URL at which a running Ray cluster accepts jobs, such as http://HEAD:8265; by default a local one "
            "starts."
        ),
    ] = None,
    dashboard_url: Annotated[
        str | None,
        typer.Option(help="URL at which the service reaches the Ray dashboard, when it differs from --ray-address."),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar="MOEDISCO_DATABASE_URL",
            show_default="SQLite in the state directory",
            help="URL of the database: sqlite:///FILE or postgresql+psycopg://...",
        ),
    ] = None,
    state_dir: StateDir = None,
    admin_token_file: Annotated[
        Path | None,
        typer.Option(
            envvar="MOEDISCO_ADMIN_TOKEN_FILE",
            metavar="FILE",
            show_default="admin-token in the state directory",
            help="File of the first administrator's token; created if it is missing.",
        ),
    ] = None,
    secrets_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="MOEDISCO_SECRETS_KEY_FILE",
            metavar="FILE",
            show_default="secrets-key in the state directory",
            help="File of the key that seals the secrets of projects; created if it is missing.",
        ),
    ] = None,
    driver_user: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            show_default="this user",
            help="Unprivileged user that the local Ray and its drivers run as; if it is set, the service must run as "
            "root.",
        ),
    ] = None,
    input_root: Annotated[
        list[str] | None,
        typer.Option(
            help="Directory, s3://BUCKET/PREFIX or hf://ORG that runs may read; may be repeated.", show_default="none"
        ),
    ] = None,
    output_root: Annotated[
        list[str] | None,
        typer.Option(
            help="Directory or s3://BUCKET/PREFIX in which runs are stored; may be repeated, the first is the default.",
            show_default="runs",
        ),
    ] = None,
    home_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the service's own files of runs at URIs; their drivers must be able to read it.",
            show_default="the first output root that is a directory, or the state directory",
        ),
    ] = None,
    storage_root: Annotated[
        list[str] | None,
        typer.Option(
            help="Directory or s3://BUCKET/PREFIX that checkpoint.storage may name; may be repeated.",
            show_default="run directories only",
        ),
    ] = None,
    map_function: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Function that a source's `map` may name; may be repeated.",
            show_default="none",
        ),
    ] = None,
    max_active_runs: Annotated[
        int | None, typer.Option(help="Maximum number of runs that are active at the same time.", show_default="4")
    ] = None,
    policies: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            envvar="MOEDISCO_POLICIES",
            help="YAML file with the prices and limits of all owners; with it, they can be changed only in this file.",
        ),
    ] = None,
    public_url: Annotated[str | None, typer.Option(help="URL at which browsers and drivers reach the service.")] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(help="Maximum number of requests per minute with one token.", show_default="1200")
    ] = None,
    webhook_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="URL that gets a signed POST when a run has ended.", show_default="none"),
    ] = None,
    forwarded_allow_ips: Annotated[
        str | None, typer.Option(metavar="ADDRESSES", help="Proxies whose X-Forwarded headers are trusted.")
    ] = None,
    sign_in_header: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Header in which these proxies name the person who has signed in there, such as X-Forwarded-Email.",
            show_default="none",
        ),
    ] = None,
    log_format: Annotated[
        Literal["console", "json"] | None, typer.Option(help="Format of the service's log.", show_default="console")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Run in the background; `moedisco stop` stops it.")] = False,
) -> None:
    """Run the service: REST API, web page and run queue.

    Ctrl-C stops it; runs continue, and the next start finds them.
    """
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "ray_address": ray_address,
        "dashboard_url": dashboard_url,
        "database_url": database_url,
        "state_dir": state_dir or default_state_dir(),
        "admin_token_file": admin_token_file,
        "secrets_key_file": secrets_key_file,
        "driver_user": driver_user,
        "input_roots": input_root or None,
        "output_roots": output_root or None,
        "home_dir": home_dir,
        "storage_roots": storage_root or None,
        "map_functions": map_function or None,
        "max_active_runs": max_active_runs,
        "policies": policies,
        "public_url": public_url,
        "requests_per_minute": requests_per_minute,
        "webhook_url": webhook_url,
        "forwarded_allow_ips": forwarded_allow_ips,
        "sign_in_header": sign_in_header,
        "log_format": log_format,
    }
    from service.domain.path_sandbox import check_roots
    from service.settings import Settings

    try:
        settings = Settings.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise _option_error(error) from error
    check_roots(settings.roots)
    if detach:
        refuse_second(settings.state_dir)
        address = start_daemon(settings.state_dir, [word for word in sys.argv[2:] if word != "--detach"])
        say(f"MoE-DisCo is at {address.url}")
        say_how_to_sign_in(address, settings.admin_token_path)
        return
    from service.serve import serve as run_service

    if run_service(settings, functools.partial(announce, settings.state_dir)):
        say("Ray and the active runs continue; the next `moedisco serve` finds them")


@commands.command(rich_help_panel=SERVICE_PANEL)
def stop(state_dir: StateDir = None) -> None:
    """Stop the service of a state directory, and its local Ray unless runs are active."""
    from service import process

    stopped = process.stop(state_dir or default_state_dir())
    say("The service has stopped" if stopped else "No service uses this state directory")


@commands.command("sign-in", rich_help_panel=SERVICE_PANEL)
def sign_in() -> None:
    """Print a link that signs one browser in to the service's page; it works once, within ten minutes."""
    from service.client.address import find_address

    say(sign_in_link(find_address()))


def announce(state_dir: Path, started: Announcement) -> None:
    """Print the service's address, and save it for this user's commands."""
    from service.client import Address, load_address, save_address

    # Each service keeps its token in its own state directory; the user's commands use the service that was started
    # last.
    own = state_dir / ADDRESS_FILE
    saved = load_address(own)
    address = Address(started.url, started.token or (saved.token if saved is not None else None), str(state_dir))
    before = used_so_far()
    save_address(address, own)
    path = save_address(address)
    say(f"MoE-DisCo is at {started.url}; your commands find it through {path}")
    say_what_is_left(before, address)
    say(f"Ray dashboard, for administrators: {started.url}/ray/")
    say_how_to_sign_in(address, started.token_file, started.sign_in_code)


def default_state_dir() -> Path:
    """State directory of this user's service, unless an option names another."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "moedisco"


def _option_error(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    option = str(first["loc"][0]).replace("_", "-").replace("roots", "root").replace("functions", "function")
    value = first["input"]
    return ConfigError(f"--{option}", value if isinstance(value, str | int | float) else str(value), plain_words(first))
