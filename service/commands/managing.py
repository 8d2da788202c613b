"""Commands for existing runs: list, status, change, cancel, resume, delete, download."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from moedisco_ray.cli.arguments import AsJson
from moedisco_ray.core.errors import UserError
from moedisco_ray.core.printable import one_line
from moedisco_ray.core.records.bill import format_dollars
from service.commands.connection import RUNS_PANEL, Budget, RunName, budget_dollars, connected, find_run
from service.commands.output import interruptible, say, transfer_bar, write_json, write_table
from service.commands.views import run_view, runs_table
from service.domain.states import RunState

if TYPE_CHECKING:
    from service.schemas import Run

commands = typer.Typer()


@commands.command("list", rich_help_panel=RUNS_PANEL)
def list_runs(
    state: Annotated[list[RunState] | None, typer.Option(help="Show only runs in this state; may be repeated.")] = None,
    owner: Annotated[str | None, typer.Option(help="Show only runs of this owner.")] = None,
    project: Annotated[str | None, typer.Option(help="Show only runs of the project with this id or name.")] = None,
    name: Annotated[str | None, typer.Option(help="Show only runs with this name.")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="KEY:VALUE", help="Show only runs with this tag.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help="Show only runs with such a figure: perplexity<30; may be repeated."),
    ] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Sort by this field: perplexity, -dollars (descending).")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of runs.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List runs, by default newest first."""
    tags = dict(_tag(text) for text in tag or ())
    with connected() as client:
        found = client.runs(
            states=state or (),
            owner=owner,
            project=project,
            name=name,
            tags=tags,
            where=where or (),
            order_by=sort,
            page_size=min(limit, 100),
        )
        runs = list(itertools.islice(found, limit))
    write_json(runs) if as_json else write_table(runs_table(runs))


@commands.command(rich_help_panel=RUNS_PANEL)
def status(run: RunName, as_json: AsJson = False) -> None:
    """Show a run's state, progress and cost."""
    with connected() as client:
        found = client.run(find_run(client, run))
        units = [] if as_json else client.units(found.id)
    write_json(found) if as_json else write_table(run_view(found, units))


@commands.command(rich_help_panel=RUNS_PANEL)
def change(
    run: RunName,
    budget: Budget = None,
    priority: Annotated[int | None, typer.Option(help="Queued runs with a higher priority start first.")] = None,
    name: Annotated[str | None, typer.Option(help="The new name.")] = None,
    note: Annotated[str | None, typer.Option(help="The new note about the run; an empty text removes it.")] = None,
    project: Annotated[str | None, typer.Option(help="Id or name of the project to move the run to.")] = None,
    keep: Annotated[
        bool | None, typer.Option("--keep/--no-keep", help="Protect the finished run from retention, or no longer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change a run's budget, priority, name, note, project or protection from retention."""
    if (budget, priority, name, note, project, keep) == (None,) * 6:
        raise UserError(
            "change",
            None,
            "names no new value; give --budget, --priority, --name, --note, --project, --keep or --no-keep",
        )
    dollars = budget_dollars(budget)
    with connected() as client:
        found = client.change(
            find_run(client, run),
            budget_dollars=dollars,
            priority=priority,
            name=name,
            note=note,
            project=project,
            kept=keep,
        )
    if as_json:
        write_json(found)
        return
    limit = found.money.budget_dollars
    facts = ["no budget" if limit is None else f"budget {format_dollars(limit)}", f"priority {found.priority}"]
    facts += [] if project is None else [f"project {found.project.name}"]
    say(f"{found.id}  {found.name}: {', '.join([*facts, *(['kept'] if found.kept else [])])}")


@commands.command(rich_help_panel=RUNS_PANEL)
def cancel(
    run: RunName,
    force: Annotated[bool, typer.Option("--force", help="Stop within a minute, without a checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop a run after a checkpoint; `resume` continues from there."""
    with connected() as client:
        found = client.cancel(find_run(client, run), force=force)
    write_json(found) if as_json else say(f"{found.id}  {found.name}: {found.state.value}")


@commands.command(rich_help_panel=RUNS_PANEL)
def resume(run: RunName, as_json: AsJson = False) -> None:
    """Queue a failed or cancelled run again; it continues from what it has stored."""
    with connected() as client:
        found = client.resume(find_run(client, run))
    write_json(found) if as_json else say(
        f"{found.id}  {found.name}: {found.state.value}; next: moedisco watch {found.id}"
    )


@commands.command(rich_help_panel=RUNS_PANEL)
def delete(
    run: RunName,
    keep_artifacts: Annotated[bool, typer.Option("--keep-artifacts", help="Keep the run's files.")] = False,
    sure: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete an ended run and its files."""
    with connected() as client:
        found = client.run(find_run(client, run))
        if not sure and sys.stdin.isatty():
            what = "" if keep_artifacts else " and its files"
            typer.confirm(one_line(f"Delete {found.name} ({found.id}){what}?"), abort=True, err=True)
        client.delete(found.id, keep_artifacts=keep_artifacts)
    write_json({"deleted": found.id}) if as_json else say(f"{found.id}  {found.name}: deleted")


@commands.command(rich_help_panel=RUNS_PANEL)
def download(
    run: RunName,
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Directory to create; by default it has the run's name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a finished run's model. After an interruption, the same command continues where it stopped."""
    shown = transfer_bar()
    with interruptible(lambda: _kept(shown)), connected(outlasts_restarts=True) as client, shown as bar:
        found = client.run(find_run(client, run))
        task = bar.add_task(found.name, total=None)
        target = client.download(
            found.id, directory or _directory(found), lambda done, total: bar.update(task, completed=done, total=total)
        )
    write_json({"directory": target}) if as_json else say(f"The model is in {target}")


def _kept(shown: Progress) -> str:
    if any(task.completed for task in shown.tasks):
        return "interrupted; the part that has arrived is kept: the same command continues from there"
    return "interrupted; nothing has arrived yet"


def _directory(run: Run) -> Path:
    # A run's name may contain any characters, such as `/`.
    return Path(re.sub(r"[^\w-]+", "-", run.name).strip("-") or run.id)


def _tag(text: str) -> tuple[str, str]:
    key, sign, value = text.partition(":")
    if not sign:
        raise UserError("--tag", text, "must read KEY:VALUE")
    return key, value
