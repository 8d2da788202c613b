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
from service.commands.connection import RUNS_PANEL, Budget, RunName, RunNames, budget_dollars, connected, find_run
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
    runs: RunNames,
    budget: Budget = None,
    priority: Annotated[int | None, typer.Option(help="Queued runs with a higher priority start first.")] = None,
    name: Annotated[str | None, typer.Option(help="The new name.")] = None,
    note: Annotated[str | None, typer.Option(help="The new note about the run; an empty text removes it.")] = None,
    tag: Annotated[list[str] | None, typer.Option(metavar="KEY:VALUE", help="Set this tag; may be repeated.")] = None,
    untag: Annotated[list[str] | None, typer.Option(metavar="KEY", help="Remove this tag; may be repeated.")] = None,
    project: Annotated[str | None, typer.Option(help="Id or name of the project to move the run to.")] = None,
    keep: Annotated[
        bool | None, typer.Option("--keep/--no-keep", help="Protect the finished run from retention, or no longer.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change a run's budget, priority, name, note, tags, project or protection from retention; also of several runs."""
    tags = {**dict.fromkeys(untag or ()), **dict(_tag(text) for text in tag or ())}
    if (budget, priority, name, note, project, keep) == (None,) * 6 and not tags:
        raise UserError(
            "change",
            None,
            "names no new value; give --budget, --priority, --name, --note, --tag, --untag, --project, --keep or "
            "--no-keep",
        )
    dollars = budget_dollars(budget)
    with connected() as client:
        for run in [find_run(client, text) for text in runs]:
            found = client.change(
                run,
                budget_dollars=dollars,
                priority=priority,
                name=name,
                note=note,
                tags=tags or None,
                project=project,
                kept=keep,
            )
            write_json(found) if as_json else say(_changed(found, show_project=project is not None))


def _changed(run: Run, *, show_project: bool) -> str:
    limit = run.money.budget_dollars
    facts = ["no budget" if limit is None else f"budget {format_dollars(limit)}", f"priority {run.priority}"]
    facts += [f"project {run.project.name}"] if show_project else []
    facts += [f"{key}: {value}" for key, value in run.tags.items()]
    return f"{run.id}  {run.name}: {', '.join([*facts, *(['kept'] if run.kept else [])])}"


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
    runs: RunNames,
    keep_artifacts: Annotated[bool, typer.Option("--keep-artifacts", help="Keep the runs' files.")] = False,
    sure: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete ended runs and their files."""
    with connected() as client:
        named = [client.run(find_run(client, text)) for text in runs]
        if not sure and sys.stdin.isatty():
            what = "" if keep_artifacts else (" and its files" if len(named) == 1 else " and their files")
            listed = ", ".join(f"{found.name} ({found.id})" for found in named)
            typer.confirm(one_line(f"Delete {listed}{what}?"), abort=True, err=True)
        for found in named:
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
