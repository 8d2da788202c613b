"""Commands about the secrets of projects."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from moedisco_ray.cli.arguments import AsJson
from moedisco_ray.core.errors import UserError
from service.commands.connection import SERVICE_PANEL, connected
from service.commands.output import say, write_json, write_table
from service.commands.views import secrets_table

if TYPE_CHECKING:
    from service.client import Client

commands = typer.Typer()
secrets = typer.Typer(
    no_args_is_help=True, help="Secrets that runs name, such as HF_TOKEN; no one can read them again."
)
commands.add_typer(secrets, name="secrets", rich_help_panel=SERVICE_PANEL)

Name = Annotated[str, typer.Argument(help="Name of the secret and of its environment variable, such as HF_TOKEN.")]
Project = Annotated[
    str | None,
    typer.Option(help="Id or name of the project; by default your own, whose secrets your runs in all projects get."),
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
    value = typer.prompt(f"Value of {name}", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read()
    value = value.rstrip("\r\n")
    if not value:
        raise UserError(name, None, f"has no value; pipe it in: `moedisco secrets set {name} < FILE`")
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


def _named(client: Client, project: str | None) -> str:
    return project if project is not None else client.identity().owner
