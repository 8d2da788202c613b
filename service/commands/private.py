"""Commands about what projects keep to themselves: secrets of runs, and the URL that gets notices."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from moedisco_ray.cli.arguments import AsJson
from moedisco_ray.core.errors import UserError
from service.commands.connection import SERVICE_PANEL, connected
from service.commands.output import say, write_json, write_table
from service.commands.views import notices_table, secrets_table

if TYPE_CHECKING:
    from service.client import Client

commands = typer.Typer()
secrets = typer.Typer(
    no_args_is_help=True, help="Secrets that runs name, such as HF_TOKEN; no one can read them again."
)
commands.add_typer(secrets, name="secrets", rich_help_panel=SERVICE_PANEL)

notify = typer.Typer(no_args_is_help=True, help="Notices about ends of runs: one URL for each project.")
commands.add_typer(notify, name="notify", rich_help_panel=SERVICE_PANEL)

Name = Annotated[str, typer.Argument(help="Name of the secret and of its environment variable, such as HF_TOKEN.")]
Project = Annotated[
    str | None,
    typer.Option(help="Id or name of the project; by default your own, which also counts for your runs in others."),
]


@secrets.command("list")
def list_secrets(project: Project = None, as_json: AsJson = False) -> None:
    """Show the names and dates of a project's secrets."""
    with connected() as client:
        found = client.secrets(_named(client, project))
    write_json(found) if as_json else write_table(secrets_table(found))


@secrets.command("set")
def set_secret(name: Name, project: Project = None, as_json: AsJson = False) -> None:
    """Set a secret; its value comes from standard input, or from a prompt that does not show it."""
    value = _read(f"Value of {name}", name, f"moedisco secrets set {name}")
    with connected() as client:
        made = client.set_secret(_named(client, project), name, value)
    write_json(made) if as_json else say(
        f"{made.name}: set; a run names it in its configuration: secrets: [{made.name}]"
    )


@secrets.command("delete")
def delete_secret(name: Name, project: Project = None, as_json: AsJson = False) -> None:
    """Delete a secret; drivers that have it keep it until they end."""
    with connected() as client:
        client.delete_secret(_named(client, project), name)
    write_json({"deleted": name}) if as_json else say(f"{name}: deleted")


@notify.command("show")
def show_notices(project: Project = None, as_json: AsJson = False) -> None:
    """Show where notices are sent, and whether the last one was accepted."""
    with connected() as client:
        found = client.notice_url(_named(client, project))
    write_json(found) if as_json else write_table(notices_table(found))


@notify.command("set")
def set_notices(project: Project = None, as_json: AsJson = False) -> None:
    """Set the URL for notices, and send a test; the URL comes from standard input, or from a prompt."""
    url = _read("URL", "URL", "moedisco notify set")
    with connected() as client:
        named = _named(client, project)
        made = client.set_notice_url(named, url)
        client.send_test_notice(named)
    write_json(made) if as_json else say(f"{made.shown}: set, and a test was sent")


@notify.command("test")
def send_test(project: Project = None, as_json: AsJson = False) -> None:
    """Send a notice that says that it is a test."""
    with connected() as client:
        client.send_test_notice(named := _named(client, project))
    write_json({"sent": named}) if as_json else say("sent")


@notify.command("clear")
def clear_notices(project: Project = None, as_json: AsJson = False) -> None:
    """Send no more notices about a project's runs."""
    with connected() as client:
        client.delete_notice_url(named := _named(client, project))
    write_json({"cleared": named}) if as_json else say(f"{named}: no more notices are sent")


def _read(prompt: str, field: str, command: str) -> str:
    """A secret from a prompt that does not show it, or from standard input."""
    found: str = typer.prompt(prompt, hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read()
    if not found.strip():
        raise UserError(field, None, f"is empty; pipe it in: `{command} < FILE`")
    return found.rstrip("\r\n")


def _named(client: Client, project: str | None) -> str:
    return project if project is not None else client.identity().owner
