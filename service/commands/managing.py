"""Commands about runs that are there: list, status, cancel, resume, delete, download."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from moedisco_ray.cli.app import AsJson
from moedisco_ray.core.errors import UserError
from service.commands.connection import RUNS_PANEL, RunName, connected, find_run
from service.commands.output import leaving, say, write_json, write_table
from service.commands.views import run_view, runs_table
from service.domain.states import RunState

if TYPE_CHECKING:
    from service.schemas import Run

commands = typer.Typer()


@commands.command("list", rich_help_panel=RUNS_PANEL)
def list_runs(
    state: Annotated[list[RunState] | None, typer.Option(help="Only runs in this state; may be given more than once.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only runs of this owner.")] = None,
    name: Annotated[str | None, typer.Option(help="Only runs of this name.")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="KEY:VALUE", help="Only runs with this tag.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Show the runs, newest first."""
    tags = dict(_tag(text) for text in tag or ())
    with connected() as client:
        found = client.runs(states=state or (), owner=owner, name=name, tags=tags, page_size=min(limit, 100))
        runs = list(itertools.islice(found, limit))
    write_json(runs) if as_json else write_table(runs_table(runs))


@commands.command(rich_help_panel=RUNS_PANEL)
def status(run: RunName, as_json: AsJson = False) -> None:
    """Show where a run stands."""
    with connected() as client:
        found = client.run(find_run(client, run))
        units = [] if as_json else client.units(found.id)
    write_json(found) if as_json else write_table(run_view(found, units))


@commands.command(rich_help_panel=RUNS_PANEL)
def cancel(
    run: RunName,
    force: Annotated[bool, typer.Option("--force", help="At once, without waiting for a checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """End a run. Resuming it later goes on from its checkpoint."""
    with connected() as client:
        found = client.cancel(find_run(client, run), force=force)
    write_json(found) if as_json else say(f"{found.id}  {found.name}: {found.state.value}")


@commands.command(rich_help_panel=RUNS_PANEL)
def resume(run: RunName, as_json: AsJson = False) -> None:
    """Queue a failed or cancelled run again; it goes on from its last checkpoint."""
    with connected() as client:
        found = client.resume(find_run(client, run))
    write_json(found) if as_json else say(f"{found.id}  {found.name}: {found.state.value}; next: moedisco watch {found.id}")


@commands.command(rich_help_panel=RUNS_PANEL)
def delete(
    run: RunName,
    keep_artifacts: Annotated[bool, typer.Option("--keep-artifacts", help="Leave its files where they are.")] = False,
    sure: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a run that has ended, and its files."""
    with connected() as client:
        found = client.run(find_run(client, run))
        if not sure and sys.stdin.isatty():
            what = "" if keep_artifacts else " and its files"
            typer.confirm(f"Delete {found.name} ({found.id}){what}?", abort=True, err=True)
        client.delete(found.id, keep_artifacts=keep_artifacts)
    write_json({"deleted": found.id}) if as_json else say(f"{found.id}  {found.name}: deleted")


@commands.command(rich_help_panel=RUNS_PANEL)
def download(
    run: RunName,
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="A new directory; left out: the run's name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a finished run's model here. Interrupted, the same command goes on where it was."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    shown = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
    kept = "the part that has arrived is kept; the same command continues from there"
    with leaving(kept), connected(outlasts_restarts=True) as client, shown as bar:
        found = client.run(find_run(client, run))
        task = bar.add_task(found.name, total=None)
        target = client.download(
            found.id, directory or _directory(found), lambda there, total: bar.update(task, completed=there, total=total))
    write_json({"directory": target}) if as_json else say(f"The model is in {target}")


def _directory(run: Run) -> Path:
    # A name may hold anything; what becomes a path here may not.
    return Path(re.sub(r"[^\w-]+", "-", run.name).strip("-") or run.id)


def _tag(text: str) -> tuple[str, str]:
    key, sign, value = text.partition(":")
    if not sign:
        raise UserError("--tag", text, "must read KEY:VALUE")
    return key, value
