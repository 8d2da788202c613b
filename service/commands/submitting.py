"""Commands that create runs or plan them: submit, estimate, retry."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moedisco_ray.cli.arguments import USUAL_FILE, AsJson, ConfigPath, Overrides
from moedisco_ray.core.config import RunConfig, load_config
from moedisco_ray.core.config.load import override_value
from moedisco_ray.core.config.places import Place, is_reference, with_places
from moedisco_ray.core.errors import ConfigError
from service.commands.connection import RUNS_PANEL, Budget, RunName, budget_dollars, connected, find_run
from service.commands.datasets import submitted
from service.commands.output import say, write_json, write_table
from service.commands.watching import watch_run
from service.domain.reuse import Reuse

if TYPE_CHECKING:
    from service.client import Client
    from service.schemas import RunDetail

commands = typer.Typer()

_DEFAULT_OUTPUT = RunConfig.model_fields["output"].default

Watch = Annotated[bool, typer.Option("--watch", help="Show the run's progress until it ends.")]


@commands.command(rich_help_panel=RUNS_PANEL)
def submit(
    config: ConfigPath = USUAL_FILE,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; by default the name in the configuration.")] = None,
    priority: Annotated[int, typer.Option(help="Runs with a higher priority start first.")] = 0,
    budget: Budget = None,
    project: Annotated[
        str | None,
        typer.Option(help="Id or name of the project whose members may see the run; by default only you may."),
    ] = None,
    upload: Annotated[
        bool | None,
        typer.Option(
            "--upload/--no-upload",
            help="Upload the local text that the configuration names: all of it, or nothing; by default what the "
            "service cannot read.",
        ),
    ] = None,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Submit a run to the service, which queues and runs it. Local text that it cannot read is uploaded."""
    asked = _absolute(
        config, [*(overrides or ()), *([f"name={json.dumps(name, ensure_ascii=False)}"] if name is not None else [])]
    )
    dollars = budget_dollars(budget)
    with connected(outlasts_restarts=watch) as client:
        send = functools.partial(client.submit, asked, priority=priority, budget_dollars=dollars, project=project)
        made = submitted(client, asked, send, upload=upload, project=project)
        _show(client, made, watch, as_json)


@commands.command(rich_help_panel=RUNS_PANEL)
def estimate(config: ConfigPath = USUAL_FILE, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Estimate a run's resources and cost at the service's prices."""
    asked = _absolute(config, overrides or [])
    with connected() as client:
        plan = client.estimate(asked)
    if as_json:
        write_json(plan)
        return
    from moedisco_ray.cli.display.plan import plan_view

    write_table(plan_view(plan))
    for note in plan.notes:
        say(note)


@commands.command(rich_help_panel=RUNS_PANEL)
def retry(
    run: RunName,
    overrides: Overrides = None,
    priority: Annotated[
        int | None,
        typer.Option(help="Runs with a higher priority start first; by default the priority of the retried run."),
    ] = None,
    budget: Budget = None,
    reuse: Annotated[
        Reuse,
        typer.Option(
            help="Runs whose finished stages the new run takes where it would make them alike: the old run and others "
            "that all who see it may see, the old run alone, or none."
        ),
    ] = "auto",
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Print which stages are reused and what the rest costs; start nothing.")
    ] = False,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Create a new run from an old run's configuration, with changed settings."""
    changes = dict(_change(override) for override in overrides or ())
    dollars = budget_dollars(budget)
    with connected(outlasts_restarts=watch) as client:
        found = find_run(client, run)
        if estimate:
            plan = client.estimate_retry(found, changes, reuse=reuse)
            write_json(plan) if as_json else say(plan.reuse_in_words)
            return
        made = client.retry(found, changes, priority=priority, budget_dollars=dollars, reuse=reuse)
        _show(client, made, watch, as_json)


def _absolute(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The configuration as plain data, with absolute paths because the service has another working directory.

    Unset settings are left out, and so is the default `output`: the service then chooses a directory.
    """
    config, base = load_config(path, overrides, for_service=True), Path.cwd()

    def absolute(place: Place) -> str | Path:
        text = str(place.value)
        remote = not isinstance(place.value, Path) and ("://" in text or text == "embedded")
        if remote or is_reference(text) or (place.field == "output" and place.value == _DEFAULT_OUTPUT):
            return place.value
        # Resolve symbolic links and `..`, because the service first compares paths with its roots as text.
        return type(place.value)((base / text).resolve())

    plain: dict[str, Any] = with_places(config, absolute).model_dump(mode="json", exclude_unset=True)
    if config.output == _DEFAULT_OUTPUT:
        plain.pop("output", None)
    return plain


def _show(client: Client, run: RunDetail, watch: bool, as_json: bool) -> None:
    if watch:
        if not as_json:
            say(f"{run.id}  {run.name}")
        watch_run(client, run.id, as_json)
    elif as_json:
        write_json(run)
    else:
        say(f"{run.id}  {run.name}: {run.state.value}; next: moedisco watch {run.id}")
        for note in run.notes:
            say(note)


def _change(override: str) -> tuple[str, Any]:
    key, sign, value = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError("--set", override, "must read key.sub=value, such as tokens.total=1000000")
    parsed = override_value(override, value)
    try:
        json.dumps(parsed, allow_nan=False)
    except (TypeError, ValueError) as error:  # YAML has dates and infinities, the request has not
        raise ConfigError(
            "--set", override, "JSON has no such value; for a text, quote it: name='\"2026-10-01\"'"
        ) from error
    return key.strip(), parsed
