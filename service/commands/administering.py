"""Commands about the service: pools, tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moedisco_ray.cli.arguments import AsJson
from service.commands.connection import SERVICE_PANEL, connected
from service.commands.output import remark, say, write_json, write_table
from service.commands.views import pools_view, tokens_table

Scope = Literal["read", "submit", "admin"]

commands = typer.Typer()
tokens = typer.Typer(no_args_is_help=True, help="Access tokens: who may use the service, and for what.")
commands.add_typer(tokens, name="tokens", rich_help_panel=SERVICE_PANEL)

Identifier = Annotated[str, typer.Argument(metavar="ID", help="Id, as `list` shows it.")]


@commands.command(rich_help_panel=SERVICE_PANEL)
def pools(as_json: AsJson = False) -> None:
    """Show the nodes and free slots of every pool."""
    with connected() as client:
        found = client.pools()
    write_json(found) if as_json else write_table(pools_view(found))


@tokens.command("list")
def list_tokens(as_json: AsJson = False) -> None:
    """Show the name, owner and scope of every token, but not its secret."""
    with connected() as client:
        found = client.tokens()
    write_json(found) if as_json else write_table(tokens_table(found))


@tokens.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="Purpose of the token.")],
    owner: Annotated[str, typer.Option(help="Owner whose runs the token can create and see.")],
    scope: Annotated[Scope, typer.Option(help="Rights of the token; each scope includes those before it.")] = "submit",
    days: Annotated[float | None, typer.Option(min=0, help="Days until the token expires.")] = 90,
    forever: Annotated[bool, typer.Option("--forever", help="Never expire.")] = False,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Create the token in the database of this state directory; no service needs to run."
        ),
    ] = None,
    database_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Create the token in the database at this URL, such as postgresql+psycopg://...; no service needs to "
            "run.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a token and show its secret, which cannot be shown again."""
    valid = None if forever else days
    if state_dir is None and database_url is None:
        with connected() as client:
            made = client.create_token(name, owner, [scope], valid)
    else:
        from service import bootstrap

        url = bootstrap.database_url(state_dir, database_url)
        made = bootstrap.create_token(url, name, owner, scope, valid)
        remark(f"created in {bootstrap.without_password(url)}")
    write_json(made) if as_json else say(made.token)


@tokens.command("revoke")
def revoke_token(token_id: Identifier, as_json: AsJson = False) -> None:
    """Make a token invalid."""
    with connected() as client:
        client.revoke_token(token_id)
    write_json({"revoked": token_id}) if as_json else say(f"{token_id}: revoked")
