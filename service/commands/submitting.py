"""Commands that make runs: submit, estimate, retry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from moedisco_ray.cli.app import AsJson, ConfigPath, Overrides
from moedisco_ray.cli.display import plan_view
from moedisco_ray.core.config import load_config
from moedisco_ray.core.config.yaml_text import parse_yaml
from moedisco_ray.core.errors import ConfigError
from service.commands.connection import RUNS_PANEL, RunName, connected, find_run
from service.commands.locating import located
from service.commands.output import say, write_json, write_table
from service.commands.watching import look_on

if TYPE_CHECKING:
    from service.client import Client
    from service.schemas import RunDetail

commands = typer.Typer()

Budget = Annotated[
    float | None, typer.Option(metavar="DOLLARS", help="Stop the run, with a checkpoint, when it has cost this much.")]
Watch = Annotated[bool, typer.Option("--watch", help="Then show it as it goes on.")]


@commands.command(rich_help_panel=RUNS_PANEL)
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="The run's name, in place of the configuration's.")] = None,
    priority: Annotated[int, typer.Option(help="Higher goes first.")] = 0,
    budget: Budget = None, watch: Watch = False, as_json: AsJson = False,
) -> None:
    """Hand a run to the service, which queues it and sees it through."""
    asked = _located(config, [*(overrides or ()), *([f"name={name}"] if name is not None else [])])
    with connected(outlasts_restarts=watch) as client:
        _tell(client, client.submit(asked, priority=priority, budget_dollars=budget), watch, as_json)


@commands.command(rich_help_panel=RUNS_PANEL)
def estimate(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Ask the service what a run would need and cost."""
    asked = _located(config, overrides or [])
    with connected() as client:
        plan = client.estimate(asked)
    if as_json:
        write_json(plan)
        return
    write_table(plan_view(plan))
    for note in plan.notes:
        say(note)


@commands.command(rich_help_panel=RUNS_PANEL)
def retry(
    run: RunName, overrides: Overrides = None,
    priority: Annotated[int | None, typer.Option(help="Higher goes first; left out: as before.")] = None,
    budget: Budget = None, watch: Watch = False, as_json: AsJson = False,
) -> None:
    """Make a new run of an old one's configuration, with some settings changed."""
    changes = dict(_change(override) for override in overrides or ())
    with connected(outlasts_restarts=watch) as client:
        made = client.retry(find_run(client, run), changes, priority=priority, budget_dollars=budget)
        _tell(client, made, watch, as_json)


def _located(config: Path, overrides: list[str]) -> dict[str, Any]:
    return located(load_config(config, overrides, for_service=True), Path.cwd())


def _tell(client: Client, run: RunDetail, watch: bool, as_json: bool) -> None:
    if watch:
        if not as_json:
            say(f"{run.id}  {run.name}")
        look_on(client, run.id, as_json)
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
    try:
        return key.strip(), parse_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError("--set", override, "the value is not YAML; quote it") from error
