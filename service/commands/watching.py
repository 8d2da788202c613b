"""Commands that show a run's progress: watch, logs."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from moedisco_ray.cli.arguments import AsJson
from moedisco_ray.cli.console import output_console, say_text
from moedisco_ray.cli.display import listener_for, report_view
from moedisco_ray.core.errors import RunError, UserError
from moedisco_ray.core.records.events import Event
from service.commands.connection import RUNS_PANEL, RunName, connected, find_run
from service.commands.output import interruptible, write_json, write_table
from service.commands.views import logs_table
from service.domain.states import TERMINAL, RunState

if TYPE_CHECKING:
    from service.client import Client

commands = typer.Typer()


@commands.command(rich_help_panel=RUNS_PANEL)
def watch(run: RunName, as_json: AsJson = False) -> None:
    """Show a run's progress until it ends. Ctrl-C stops watching, not the run."""
    with connected(outlasts_restarts=True) as client:
        watch_run(client, find_run(client, run), as_json)


@commands.command(rich_help_panel=RUNS_PANEL)
def logs(
    run: RunName,
    unit: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Show the log of this unit, such as submodel-0, instead of the driver's."),
    ] = None,
    tail: Annotated[int, typer.Option(min=0, help="Number of lines from the end.")] = 200,
    follow: Annotated[bool, typer.Option("--follow", help="Show new lines until the run ends.")] = False,
    which: Annotated[bool, typer.Option("--list", help="List the run's logs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a log of a run's driver or of a unit's worker."""
    with connected(outlasts_restarts=follow) as client:
        run_id = find_run(client, run)
        if which:
            found = client.logs(run_id)
            write_json(found) if as_json else write_table(logs_table(found))
            return
        name = "driver" if unit is None else _log_of(client, run_id, unit)
        if follow:
            with interruptible(lambda: f"the log continues: moedisco logs {run_id} --follow"):
                for line in client.follow_log(run_id, name, tail=tail):
                    write_json({"line": line}) if as_json else say_text(line)
            return
        text = client.log(run_id, name, tail=tail)
    write_json({"name": name, "lines": text.splitlines()}) if as_json else say_text(text)


def watch_run(client: Client, run_id: str, as_json: bool) -> None:
    """Show a run's events until it ends, then its report.

    Raises:
        RunError: The run did not succeed.
    """
    with interruptible(lambda: f"the run continues: moedisco watch {run_id}"):
        _show_events(client, run_id, as_json)
        run = client.run(run_id)
        if run.state != RunState.SUCCEEDED:
            reason = run.reason if run.reason != run.state.value else None
            raise RunError(f"run {run.name} {run.state.value}: {reason or 'no reason is known'}")
        if not as_json:
            console = output_console()
            console.print()
            console.print(Text(run.notice, "yellow") if run.notice else report_view(client.report(run_id)))
            console.print(f"\nTo get the model: moedisco download {run_id}", soft_wrap=True)


def _show_events(client: Client, run_id: str, as_json: bool) -> None:
    console = output_console()
    last: int | None = None
    with contextlib.closing(listener_for(console, as_json)) as view:
        while True:
            for position, event in client.events(run_id, last):
                last = position
                if event.type == "state" and not as_json:
                    console.print(_state_line(event))  # printed above the live view, which shows only training progress
                else:
                    view(event)
            if client.run(run_id).state in TERMINAL:  # otherwise the run was resumed in the meantime
                return


def _state_line(event: Event) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    state, reason = event.data.get("state", ""), event.data.get("reason")
    return Text(f"{clock}  {state}: {reason}" if reason else f"{clock}  {state}")


def _log_of(client: Client, run_id: str, unit: str) -> str:
    names = sorted(log.name for log in client.logs(run_id))
    if unit in names:
        return unit
    workers = [name for name in names if name.rpartition(".")[0] == unit]
    if not workers:
        raise UserError("--unit", unit, f"has no log; the run's logs: {', '.join(names) or 'none yet'}")
    return workers[0]  # rank 0's log is enough, because all workers of a gang log the same
