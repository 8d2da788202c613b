"""Commands about limits: the operator's policies, an owner's quota, and which runs are kept."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moedisco_ray.cli.app import AsJson
from moedisco_ray.core.config.load import apply_override
from moedisco_ray.core.errors import UserError
from service.commands.connection import RUNS_PANEL, SERVICE_PANEL, RunName, connected, find_run
from service.commands.output import say, write_json, write_table
from service.commands.views import policies_table, quota_view

if TYPE_CHECKING:
    from service.domain.policies import Policies

commands = typer.Typer()
policies = typer.Typer(no_args_is_help=True, help="Prices and limits of every owner; for administrators.")
commands.add_typer(policies, name="policies", rich_help_panel=SERVICE_PANEL)

OwnerOption = Annotated[str | None, typer.Option(help="This owner's own entry; left out: the default.")]


@policies.command("show")
def show_policies(as_json: AsJson = False) -> None:
    """Show the limits that hold for every owner with an entry, and for all others."""
    with connected() as client:
        found = client.policies()
    write_json(_plain(found)) if as_json else write_table(policies_table(found))


@policies.command("set")
def set_policy(
    settings: Annotated[list[str], typer.Argument(
        metavar="KEY=VALUE...",
        help="Such as prices.low_mem_gpu=0.35, highest_priority=10, 'resources=\\[low_mem_gpu]', dollars_per_month=500, "
             "retention.days=90; null: no limit.")],
    owner: OwnerOption = None,
    as_json: AsJson = False,
) -> None:
    """Change limits of the default or of one owner; what is not named stays."""
    with connected() as client:
        raw = _plain(client.policies())
        entry = raw.setdefault("default", {}) if owner is None else raw.setdefault("owners", {}).setdefault(owner, {})
        for setting in settings:
            if "=" not in setting:
                raise UserError("KEY=VALUE", setting, "must read key=value, such as highest_priority=10")
            apply_override(entry, setting)
        changed = _checked(raw)
        if owner is None:
            client.set_policies(changed)
        else:
            client.set_policy(owner, changed.owners[owner])
    _show(changed, as_json)


@policies.command("apply")
def apply_policies(
    file: Annotated[Path, typer.Argument(help="YAML with `default` and `owners`; see cluster_yaml/policies.yaml.")],
    as_json: AsJson = False,
) -> None:
    """Replace all policies by those of a file."""
    wanted: Policies = importlib.import_module("service.policies_file").load_policies(file)
    with connected() as client:
        client.set_policies(wanted)
    _show(wanted, as_json)


@policies.command("remove")
def remove_policy(owner: Annotated[str, typer.Argument(help="Whose entry.")], as_json: AsJson = False) -> None:
    """Delete an owner's own entry, so that the default holds."""
    with connected() as client:
        client.delete_policy(owner)
    write_json({"removed": owner}) if as_json else say(f"{owner}: the default holds")


@commands.command(rich_help_panel=RUNS_PANEL)
def quota(
    owner: Annotated[str | None, typer.Option(help="Whose, for administrators; left out: your own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what you may use and what you use: runs, dollars this month, disk, prices."""
    with connected() as client:
        found = client.quota(owner)
    write_json(found) if as_json else write_table(quota_view(found))


@commands.command(rich_help_panel=RUNS_PANEL)
def keep(
    run: RunName,
    undo: Annotated[bool, typer.Option("--undo", help="Let retention remove it again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Keep a finished run: retention does not remove it."""
    with connected() as client:
        found = client.change(find_run(client, run), kept=not undo)
    words = "retention may remove it" if undo else "kept"
    write_json(found) if as_json else say(f"{found.id}  {found.name}: {words}")


def _show(changed: Policies, as_json: bool) -> None:
    write_json(_plain(changed)) if as_json else write_table(policies_table(changed))


def _plain(found: Policies) -> dict[str, Any]:
    return found.model_dump(mode="json", exclude_unset=True)


def _checked(raw: dict[str, Any]) -> Policies:
    # Late, as everything that `--help` does not need.
    checked: Policies = importlib.import_module("service.policies_file").check_policies(raw, "the policies")
    return checked
