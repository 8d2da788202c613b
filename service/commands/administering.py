"""Commands about the service: pools, projects, tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moedisco_ray.cli.arguments import AsJson
from moedisco_ray.core.errors import UserError
from service.commands.connection import SERVICE_PANEL, ProjectName, connected
from service.commands.output import remark, say, write_json, write_table
from service.commands.views import pools_view, projects_table, tokens_table
from service.domain.access import MemberRole

Scope = Literal["read", "submit", "admin"]

commands = typer.Typer()
tokens = typer.Typer(no_args_is_help=True, help="Access tokens: who may use the service, and for what.")
commands.add_typer(tokens, name="tokens", rich_help_panel=SERVICE_PANEL)
projects = typer.Typer(no_args_is_help=True, help="Projects: who may see and change which runs.")
commands.add_typer(projects, name="projects", rich_help_panel=SERVICE_PANEL)

Member = Annotated[str, typer.Argument(metavar="MEMBER", help="Owner that the member's tokens act for.")]
Identifier = Annotated[str, typer.Argument(metavar="ID", help="Id, as `list` shows it.")]


@commands.command(rich_help_panel=SERVICE_PANEL)
def pools(as_json: AsJson = False) -> None:
    """Show the nodes and free slots of every pool."""
    with connected() as client:
        found = client.pools()
    write_json(found) if as_json else write_table(pools_view(found))


@projects.command("list")
def list_projects(as_json: AsJson = False) -> None:
    """Show your projects with their members; an administrator sees all projects."""
    with connected() as client:
        found = list(client.projects())
    write_json(found) if as_json else write_table(projects_table(found))


@projects.command("create")
def create_project(
    name: Annotated[str, typer.Argument(help="Name of the project, such as german-law.")], as_json: AsJson = False
) -> None:
    """Create a project, which only you can see until you add members."""
    with connected() as client:
        made = client.create_project(name)
    write_json(made) if as_json else say(f"{made.id}  {made.name}; next: moedisco projects add {made.name} MEMBER")


@projects.command("rename")
def rename_project(
    project: ProjectName, name: Annotated[str, typer.Argument(help="The new name.")], as_json: AsJson = False
) -> None:
    """Rename a project of yours."""
    with connected() as client:
        found = client.rename_project(project, name)
    write_json(found) if as_json else say(f"{found.id}  {found.name}")


@projects.command("delete")
def delete_project(project: ProjectName, as_json: AsJson = False) -> None:
    """Delete a project of yours that has no runs, with its members and secrets."""
    with connected() as client:
        client.delete_project(project)
    write_json({"deleted": project}) if as_json else say(f"{project}: deleted")


@projects.command("add")
def add_member(
    project: ProjectName,
    member: Member,
    role: Annotated[
        MemberRole, typer.Option(help="A viewer sees the runs; an editor also submits, changes and deletes them.")
    ] = "viewer",
    as_json: AsJson = False,
) -> None:
    """Add a member to a project of yours, or change the member's role."""
    with connected() as client:
        found = client.set_member(project, member, role)
    write_json(found) if as_json else write_table(projects_table([found]))


@projects.command("remove")
def remove_member(project: ProjectName, member: Member, as_json: AsJson = False) -> None:
    """Remove a member from a project of yours, or yourself from another one."""
    with connected() as client:
        client.remove_member(project, member)
    write_json({"removed": member}) if as_json else say(f"{project}: {member} removed")


@tokens.command("list")
def list_tokens(as_json: AsJson = False) -> None:
    """Show your tokens without their secrets; an administrator sees all tokens."""
    with connected() as client:
        found = list(client.tokens())
    write_json(found) if as_json else write_table(tokens_table(found))


@tokens.command("create")
def create_token(
    name: Annotated[str, typer.Argument(help="Purpose of the token.")],
    owner: Annotated[
        str | None, typer.Option(help="Owner that the token acts for; by default you. Administrators may name others.")
    ] = None,
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

        if owner is None:
            raise UserError("--owner", None, "is required with --state-dir and --database-url; name the owner")

        url = bootstrap.database_url(state_dir, database_url)
        made = bootstrap.create_token(url, name, owner, scope, valid)
        remark(f"created in {bootstrap.without_password(url)}")
    write_json(made) if as_json else say(made.token)


@tokens.command("rotate")
def rotate_token(token_id: Identifier, as_json: AsJson = False) -> None:
    """Replace a token's secret and show the new one; the earlier one ends at once."""
    with connected() as client:
        made = client.rotate_token(token_id)
    write_json(made) if as_json else say(made.token)


@tokens.command("revoke")
def revoke_token(token_id: Identifier, as_json: AsJson = False) -> None:
    """Make a token invalid."""
    with connected() as client:
        client.revoke_token(token_id)
    write_json({"revoked": token_id}) if as_json else say(f"{token_id}: revoked")
