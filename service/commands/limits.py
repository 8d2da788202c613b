"""Commands about limits: policies, quotas and spending."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moedisco_ray.cli.arguments import AsJson
from moedisco_ray.core.config.load import apply_override
from moedisco_ray.core.errors import UserError
from service.commands.connection import RUNS_PANEL, SERVICE_PANEL, connected
from service.commands.output import say, write_json, write_table
from service.commands.views import policies_table, quota_view, spending_table

if TYPE_CHECKING:
    from service.domain.policies import Policies

commands = typer.Typer()
policies = typer.Typer(no_args_is_help=True, help="Prices and limits of all owners, for administrators.")
commands.add_typer(policies, name="policies", rich_help_panel=SERVICE_PANEL)

OwnerOption = Annotated[str | None, typer.Option(help="Change the policy of this owner instead of the default policy.")]


@commands.command(rich_help_panel=SERVICE_PANEL)
def spending(
    by: Annotated[
        str, typer.Option(metavar="FIELDS", help="Fields to group by, separated by commas: owner, project, month.")
    ] = "owner,project,month",
    month: Annotated[str | None, typer.Option(metavar="YYYY-MM", help="Count this month (UTC) alone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the dollars of your runs and projects, also of deleted runs; an administrator sees all."""
    with connected() as client:
        found = client.spending([field.strip() for field in by.split(",")], month)
    write_json(found) if as_json else write_table(spending_table(found))


@policies.command("show")
def show_policies(as_json: AsJson = False) -> None:
    """Show the default policy and the policy of every owner that has one."""
    with connected() as client:
        found = client.policies()
    write_json(_plain(found)) if as_json else write_table(policies_table(found))


@policies.command("set")
def set_policy(
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE...",
            help="Settings to change, such as prices.low_mem_gpu=0.35, highest_priority=10, "
            "'resources=\\[low_mem_gpu]', dollars_per_month=500, retention.days=90; null means no limit.",
        ),
    ],
    owner: OwnerOption = None,
    as_json: AsJson = False,
) -> None:
    """Change settings of the default policy or of one owner's policy; other settings stay as they are."""
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
    """Replace all policies with those in a file."""
    from service.policies_file import load_policies

    wanted = load_policies(file)
    with connected() as client:
        client.set_policies(wanted)
    _show(wanted, as_json)


@policies.command("remove")
def remove_policy(owner: Annotated[str, typer.Argument(help="Owner of the policy.")], as_json: AsJson = False) -> None:
    """Delete the policy of an owner; the default policy then applies."""
    with connected() as client:
        client.delete_policy(owner)
    write_json({"removed": owner}) if as_json else say(f"{owner}: the default policy applies")


@commands.command(rich_help_panel=RUNS_PANEL)
def quota(
    owner: Annotated[
        str | None, typer.Option(help="Show the quota of this owner instead of your own; for administrators.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show your limits and usage: runs, dollars this month, disk, prices."""
    with connected() as client:
        found = client.quota(owner)
    write_json(found) if as_json else write_table(quota_view(found))


def _show(changed: Policies, as_json: bool) -> None:
    write_json(_plain(changed)) if as_json else write_table(policies_table(changed))


def _plain(found: Policies) -> dict[str, Any]:
    return found.model_dump(mode="json", exclude_unset=True)


def _checked(raw: dict[str, Any]) -> Policies:
    from service.policies_file import check_policies

    return check_policies(raw, "the policies")
