"""Commands about the service: pools, tokens, webhooks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moedisco_ray.cli.app import AsJson
from service.commands.connection import SERVICE_PANEL, connected
from service.commands.output import remark, say, write_json, write_table
from service.commands.views import pools_view, tokens_table, webhooks_table
from service.domain.states import RunState

Scope = Literal["read", "submit", "admin"]

commands = typer.Typer()
tokens = typer.Typer(no_args_is_help=True, help="Who may ask, and for what.")
webhooks = typer.Typer(no_args_is_help=True, help="Who is told when a run's state changes.")
for group, title in ((tokens, "tokens"), (webhooks, "webhooks")):
    commands.add_typer(group, name=title, rich_help_panel=SERVICE_PANEL)

Identifier = Annotated[str, typer.Argument(metavar="ID", help="As `list` shows it.")]


@commands.command(rich_help_panel=SERVICE_PANEL)
def pools(as_json: AsJson = False) -> None:
    """Show the machines of every pool, and what is free."""
    with connected() as client:
        found = client.pools()
    write_json(found) if as_json else write_table(pools_view(found))


@tokens.command("list")
def list_tokens(as_json: AsJson = False) -> None:
    """Show every token's name, owner and rights; never the token."""
    with connected() as client:
        found = client.tokens()
    write_json(found) if as_json else write_table(tokens_table(found))


@tokens.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    owner: Annotated[str, typer.Option(help="Whose runs it makes and sees.")],
    scope: Annotated[Scope, typer.Option(help="What it may do; each holds those before it.")] = "submit",
    days: Annotated[float | None, typer.Option(min=0, help="Valid for so many days.")] = 90,
    forever: Annotated[bool, typer.Option("--forever", help="Does not expire.")] = False,
    state_dir: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Make it in the database of this state directory; no service need run.")] = None,
    database_url: Annotated[str | None, typer.Option(
        metavar="URL", help="Make it in this database, as `moedisco serve` names it; no service need run.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token and show it, this once."""
    valid = None if forever else days
    if state_dir is None and database_url is None:
        with connected() as client:
            made = client.create_token(name, owner, [scope], valid)
    else:
        from service import bootstrap
        url = bootstrap.database_url(state_dir, database_url)
        made = bootstrap.create_token(url, name, owner, scope, valid)
        remark(f"made in {bootstrap.without_password(url)}")
    write_json(made) if as_json else say(made.token)


@tokens.command("revoke")
def revoke_token(token_id: Identifier, as_json: AsJson = False) -> None:
    """Make a token invalid."""
    with connected() as client:
        client.revoke_token(token_id)
    write_json({"revoked": token_id}) if as_json else say(f"{token_id}: revoked")


@webhooks.command("list")
def list_webhooks(as_json: AsJson = False) -> None:
    """Show who is told."""
    with connected() as client:
        found = client.webhooks()
    write_json(found) if as_json else write_table(webhooks_table(found))


@webhooks.command("create")
def create_webhook(
    url: Annotated[str, typer.Argument(help="Where to POST.")],
    state: Annotated[list[RunState] | None, typer.Option(help="Only of this state; may be given more than once.")] = None,
    as_json: AsJson = False,
) -> None:
    """Have state changes told to a URL, and show the secret that signs them, this once."""
    with connected() as client:
        made = client.create_webhook(url, state or ())
    write_json(made) if as_json else say(f"{made.id}  secret: {made.secret}")


@webhooks.command("delete")
def delete_webhook(webhook_id: Identifier, as_json: AsJson = False) -> None:
    """Tell it no more."""
    with connected() as client:
        client.delete_webhook(webhook_id)
    write_json({"deleted": webhook_id}) if as_json else say(f"{webhook_id}: deleted")
