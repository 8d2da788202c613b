"""Tables of runs, pools, tokens, policies, quotas and logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moedisco_ray.cli.display.formatting import PlainTable, count
from moedisco_ray.core.printable import one_line
from moedisco_ray.core.records.bill import format_dollars, format_seconds, idle_in_words
from service.commands.output import moment
from service.domain.notices import verdict
from service.domain.states import RunState

if TYPE_CHECKING:
    from service.domain.policies import Policies, Retention
    from service.schemas import (
        DatasetInfo,
        Failure,
        Forecast,
        LogFile,
        NoticeUrl,
        PoolList,
        ProjectInfo,
        Quota,
        Run,
        RunDetail,
        SecretInfo,
        SpentDollars,
        TokenInfo,
        Unit,
    )

_STYLES = {
    RunState.QUEUED: "yellow",
    RunState.STARTING: "cyan",
    RunState.RUNNING: "bold cyan",
    RunState.STOPPING: "yellow",
    RunState.SUCCEEDED: "green",
    RunState.FAILED: "bold red",
    RunState.CANCELLED: "dim",
}


def runs_table(runs: Sequence[Run]) -> Table:
    """A table of runs, with the figures of their models if any has one; the lowest perplexity is marked."""
    measured = [run.results.perplexity for run in runs if run.results.perplexity is not None]
    best = min(measured) if len(measured) > 1 else None
    figures = ("perplexity", "bits/byte", "tokens") if measured else ()
    table = left_aligned("id", "name", "owner", "state", "created", "dollars", *figures, "")
    for run in runs:
        results = run.results
        mark = " best" if results.perplexity is not None and results.perplexity == best else ""
        shown = (
            "" if results.perplexity is None else f"{results.perplexity:.2f}{mark}",
            "" if results.bits_per_byte is None else f"{results.bits_per_byte:.3f}",
            "" if results.tokens is None else count(results.tokens),
        )
        note = (run.note or "").partition("\n")[0]
        add_row(
            table,
            run.id,
            run.name,
            run.owner,
            state_text(run),
            moment(run.created),
            format_dollars(run.money.dollars),
            *(shown if measured else ()),
            Text(one_line(". ".join(filter(None, (note, *_project(run), run.reason, run.notice)))), "dim"),
        )
    return table


def run_view(run: RunDetail, units: Sequence[Unit]) -> RenderableType:
    """One run: its state, stages, units and cost."""
    facts = [f"owner {run.owner}", *_project(run), f"created {moment(run.created)}", f"priority {run.priority}"]
    facts += [f"attempt {run.attempt}"] if run.attempt > 1 else []
    facts += [f"retry of {run.parent}"] if run.parent else []
    facts += ["kept"] if run.kept else []
    facts += [f"reuses {', '.join(found.stages)} of {found.name or found.run}" for found in run.reuses]
    facts += [f"{key}: {value}" for key, value in run.tags.items()]
    parts: list[RenderableType] = [
        Text.assemble((run.name, "bold"), f"  {run.id}  ", state_text(run)),
        Text(", ".join(facts), "dim"),
    ]
    if run.note:
        parts.append(Text(one_line(run.note), "italic"))
    if run.reason:
        parts.append(Text(run.reason))
    if run.failure is not None:
        parts += [Text(one_line(words)) for words in _next_steps(run.id, run.failure)]
    if run.notice:
        parts.append(Text(f"This run: {run.notice}", "yellow"))
    if run.stages:
        table = PlainTable("stage", "", "time")
        for stage in run.stages:
            add_row(table, stage.name, stage.status, "" if stage.seconds is None else format_seconds(stage.seconds))
        parts.append(Padding(table, (1, 0, 0, 0)))
    if units:
        parts.append(Padding(_units(units), (1, 0, 0, 0)))
    parts.append(Padding(Text(_money(run)), (1, 0, 0, 0)))
    if run.expires_at is not None:
        parts.append(
            Text(
                f"Removed with its files after {moment(run.expires_at)}; to keep it: moedisco change {run.id} --keep",
                "yellow",
            )
        )
    parts += [Text(note, "dim") for note in getattr(run, "notes", ())]
    if run.job_url:
        parts.append(Text(f"Ray job: {run.job_url}", "dim", overflow="fold"))
    return Group(*parts)


def _project(run: Run) -> list[str]:
    """The project, if it is not the default project of the run's owner."""
    project = run.project
    return [] if project.name == project.owner == run.owner else [f"project {project.name} of {project.owner}"]


def state_text(run: Run) -> Text:
    """A run's state, with its position in the queue."""
    position = f" (#{run.position})" if run.position is not None else ""
    return Text(run.state.value + position, _STYLES[run.state])


def pools_view(pools: PoolList) -> RenderableType:
    """A table of pools, with a warning if Ray does not answer."""
    table = PlainTable("pool", "free", "slots", "GPUs", "nodes", "lost in 24 h", "requested", "dollars per hour")
    for pool in pools.items:
        alive = sum(node.alive for node in pool.nodes)
        add_row(
            table,
            pool.resource,
            f"{pool.free:g}",
            f"{pool.slots:g}",
            f"{pool.gpus:g}",
            str(alive),
            str(pool.lost),
            str(pool.pending),
            "" if pool.price_per_hour is None else f"{pool.price_per_hour:g}",
        )
    return table if pools.connected else Group(Text("Ray does not answer; the last known state:", "yellow"), table)


def tokens_table(tokens: Iterable[TokenInfo]) -> Table:
    table = left_aligned("id", "name", "owner", "scope", "created", "expires", "last used", "")
    for token in tokens:
        add_row(
            table,
            token.id,
            token.name,
            token.owner,
            ", ".join(token.scopes),
            moment(token.created),
            moment(token.expires) or "never",
            moment(token.used),
            "" if token.revoked is None else Text("revoked", "red"),
        )
    return table


def secrets_table(secrets: Iterable[SecretInfo]) -> Table:
    table = left_aligned("name", "set", "by")
    for secret in secrets:
        add_row(table, secret.name, moment(secret.updated), secret.set_by)
    return table


def notices_table(found: NoticeUrl) -> Table:
    table = left_aligned("url", "set", "by", "last notice", "")
    failure = Text(one_line(f"not accepted: {found.failure}"), "red") if found.failure else ""
    add_row(table, found.shown, moment(found.updated), found.set_by, moment(found.sent), failure)
    return table


def spending_table(groups: Sequence[SpentDollars]) -> Table:
    first = groups[0] if groups else None
    names = [name for name in ("month", "owner", "project") if getattr(first, name, None) is not None]
    table = left_aligned(*names, "dollars")
    for each in groups:
        cells = {"month": each.month, "owner": each.owner, "project": each.project_name or each.project}
        add_row(table, *(cells[name] or "" for name in names), format_dollars(each.dollars))
    return table


def projects_table(projects: Iterable[ProjectInfo]) -> Table:
    table = left_aligned("id", "name", "owner", "your role", "members")
    for project in projects:
        members = ", ".join(f"{member.name} ({member.role})" for member in project.members)
        add_row(table, project.id, project.name, project.owner, project.role, members)
    return table


def datasets_table(datasets: Iterable[DatasetInfo]) -> Table:
    table = left_aligned("id", "name", "hash", "owner", "your role", "files", "size", "created")
    for each in datasets:
        facts = (str(each.count), decimal(each.bytes), moment(each.created))
        add_row(table, each.id, each.name, f"sha256:{each.hash[:12]}", each.owner, each.role, *facts)
    return table


def policies_table(policies: Policies) -> Table:
    """A table of policies: the default, then each owner's with the default filled in."""
    table = left_aligned(
        "owner", "resources", "dollars per hour", "priority", "queued", "active", "dollars a month", "disk", "kept for"
    )
    for name, policy in (("default", policies.default), *((name, policies.of(name)) for name in policies.owners)):
        add_row(
            table,
            name,
            _resources(policy.resources),
            _prices(policy.prices),
            str(policy.highest_priority),
            _limit(policy.queued_runs),
            _limit(policy.active_runs),
            _dollars(policy.dollars_per_month),
            "any" if policy.disk_bytes is None else gigabytes(policy.disk_bytes),
            _kept_for(policy.retention),
        )
    return table


def quota_view(quota: Quota) -> RenderableType:
    """Limits of an owner and their usage."""
    table = left_aligned("", "used", "limit")
    add_row(table, "queued runs", f"{quota.queued_runs.used:,.0f}", _limit(quota.queued_runs.limit))
    add_row(table, "active runs", f"{quota.active_runs.used:,.0f}", _limit(quota.active_runs.limit))
    add_row(table, f"dollars in {quota.month}", format_dollars(quota.dollars.used), _dollars(quota.dollars.limit))
    most = quota.disk_bytes.limit
    add_row(table, "disk", gigabytes(quota.disk_bytes.used), "any" if most is None else gigabytes(most))
    facts = [
        f"Resources: {_resources(quota.resources)}",
        f"Prices per worker-hour: {_prices(quota.prices)}",
        f"Highest priority: {quota.highest_priority}",
        f"Finished runs are kept: {_kept_for(quota.retention)}",
    ]
    return Group(Text(f"Quota of {quota.owner}", "bold"), table, *(Text(fact) for fact in facts))


def logs_table(logs: Iterable[LogFile]) -> Table:
    table = left_aligned("log", "last line at", "bytes")
    for log in logs:
        add_row(table, log.name, moment(log.updated), f"{log.bytes:,}")
    return table


def gigabytes(size: float) -> str:
    """A size in GB (10^9 bytes)."""
    return f"{size / 1e9:,.1f} GB"


def _limit(most: float | None) -> str:
    return "any" if most is None else f"{most:,.0f}"


def _dollars(most: float | None) -> str:
    return "any" if most is None else format_dollars(most)


def _resources(names: Sequence[str] | None) -> str:
    return "any" if names is None else ", ".join(names) or "none"


def _prices(prices: Mapping[str, float]) -> str:
    return ", ".join(f"{name} ${price:g}" for name, price in prices.items()) or "as configured"


def _kept_for(retention: Retention) -> str:
    rules = [] if retention.days is None else [f"{retention.days:g} days"]
    rules += [] if retention.finished_runs is None else [f"the newest {retention.finished_runs}"]
    return ", and of these ".join(rules) or "always"


def _units(units: Iterable[Unit]) -> Table:
    table = PlainTable("unit", "", "step", "loss", "tokens", "tokens/s", "restarts", "node")
    for unit in units:
        add_row(
            table,
            unit.unit,
            unit.status,
            f"{unit.step}/{unit.steps}",
            "" if unit.loss is None else f"{unit.loss:.4f}",
            count(unit.tokens),
            "" if unit.tokens_per_second is None else count(unit.tokens_per_second),
            str(unit.restarts),
            unit.node or "",
        )
    return table


def _money(run: RunDetail) -> str:
    bill, budget = run.bill, run.money.budget_dollars
    allowed = "" if budget is None else f"; budget {format_dollars(budget)}"
    planned = f"planned {format_dollars(run.money.estimate_dollars)}"
    if not run.reuses:
        planned += f" and {format_seconds(run.estimate.seconds)}"
    saving = "" if bill.verdict is None else f"\n{bill.verdict}"
    expected = "" if run.forecast is None else f"\n{_expected(run.forecast)}"
    result = verdict(run.results.held_out_loss, run.results.perplexity, run.parent_held_out_loss)
    shown = "" if result is None else f"{result}\n"
    return f"{shown}{idle_in_words(bill)}, in {format_seconds(bill.seconds)}; {planned}{allowed}{expected}{saving}"


def _next_steps(run_id: str, failure: Failure) -> list[str]:
    """What to do about a failed run, one line each."""
    unit = "" if failure.unit is None else f" --unit {failure.unit}"
    steps = [f"Its log: moedisco logs {run_id}{unit}"]
    if failure.changes:
        changed = " ".join(f"--set {path}={value:g}" for path, value in failure.changes.items())
        steps.append(f"With {failure.meaning}: moedisco retry {run_id} {changed}")
    return steps


def _expected(forecast: Forecast) -> str:
    cost = "" if forecast.dollars is None else f" at about {format_dollars(forecast.dollars)}"
    return f"Ends at about {moment(forecast.ends)}{cost}."


def add_row(table: Table, *cells: str | Text) -> None:
    """Add a row of texts, in which markup and control characters are shown as they are."""
    # Cells are `Text` objects: in a string, rich would interpret markup in user-chosen names.
    table.add_row(*(Text(one_line(cell)) if isinstance(cell, str) else cell for cell in cells))


def left_aligned(*titles: str) -> Table:
    """A table whose columns are all aligned to the left, with long cells folded."""
    table = PlainTable(titles[0], *titles[1:])
    for column in table.columns:
        column.justify, column.overflow = "left", "fold"
    return table
