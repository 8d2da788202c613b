"""Commands that back up the service's database and restore it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moedisco_ray.cli.arguments import AsJson
from service.commands.connection import SERVICE_PANEL
from service.commands.output import say, write_json
from service.commands.serving import StateDir, default_state_dir

commands = typer.Typer()

DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        envvar="MOEDISCO_DATABASE_URL",
        metavar="URL",
        show_default="SQLite in the state directory",
        help="URL of the database: sqlite:///FILE or postgresql+psycopg://...",
    ),
]


@commands.command(rich_help_panel=SERVICE_PANEL)
def backup(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="File to write, such as service.tar.gz; an earlier one is replaced.")
    ],
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Back up the service's database and secrets to one file, also while the service runs.

    Run directories are not in it.
    """
    from service.backups import back_up

    place = state_dir or default_state_dir()
    made = back_up(_database(place, database_url), place, file)
    if as_json:
        write_json(made)
    else:
        runs, size = made.count("runs"), file.stat().st_size
        found = f"{runs} {'run' if runs == 1 else 'runs'}, {size / 2**20:.1f} MiB"
        say(f"{file}: {found}; keep it private, because it has the service's secrets")


@commands.command(rich_help_panel=SERVICE_PANEL)
def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Backup that `moedisco backup` wrote.")],
    state_dir: StateDir = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Restore a backup into an empty database, of SQLite or PostgreSQL; no service may run."""
    from service.backups import restore as restore_backup

    place = state_dir or default_state_dir()
    made, files = restore_backup(_database(place, database_url), place, file)
    if as_json:
        write_json(made)
    else:
        runs = made.count("runs")
        say(f"{file}: {runs} {'run' if runs == 1 else 'runs'} restored; `moedisco serve` continues with them")
        if files:
            say(f"Also restored to {place}: {', '.join(files)}")


def _database(state_dir: Path, url: str | None) -> str:
    from service.settings import Settings

    return url or Settings(state_dir=state_dir).database
