"""Converts database rows into response bodies of the REST API."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from moedisco_ray.core.records.bill import Bill, make_bill
from moedisco_ray.core.records.metered import metered_bill
from moedisco_ray.core.records.run_record import RunReport
from service.api.context import ServiceContext
from service.api.security import Caller
from service.database import projects, reuse, runs, sharers, tables
from service.database.metrics import UnitCurve
from service.domain.failure import failure_of
from service.domain.forecast import StageState, UnitState, forecast, planned_run
from service.domain.jobs import submission_id
from service.domain.reuse import dollars_without
from service.domain.states import RunState
from service.errors import UnusableRun
from service.schemas import Failure, Forecast, Results, Run, RunDetail, RunProject, Series


def run_answers(context: ServiceContext, caller: Caller, session: Session, rows: Sequence[tables.RunRow]) -> list[Run]:
    """Response bodies for runs, with their places in the queue."""
    shared = _shared(session, caller, rows)
    return [Run.model_validate(_run(context, caller, row, shared)) for row in rows]


def run_detail(context: ServiceContext, caller: Caller, session: Session, row: tables.RunRow) -> RunDetail:
    """Response body for a run, with its configuration and its bill.

    If this version of the service cannot read the run's documents, the bill has only the metered total, no lines.
    """
    shared = _shared(session, caller, [row])
    shown = _run(context, caller, row, shared)
    taken = reuse.taken(session, row.id, caller.person) if row.id in shared.taken else []
    try:
        bill = metered_bill(row.usage, row.settings)
    except UnusableRun as error:
        bill = bare_bill(row.dollars, planned=False)
        shown["notice"] = shown["notice"] or str(error)
    return RunDetail.model_validate(
        {
            **shown,
            "reuses": [{"run": offer.donor, "name": name, "stages": offer.stages} for offer, name in taken],
            "config": row.document,
            "notes": row.notes or [],
            "bill": bill,
            "estimate": row.estimate.get("bill") or bare_bill(None, planned=True),
            "failure": _failure(session, row),
            "parent_held_out_loss": _loss_of_parent(session, caller, row),
            "forecast": _forecast(context, session, row),
        }
    )


def _loss_of_parent(session: Session, caller: Caller, row: tables.RunRow) -> float | None:
    parent = None if row.parent is None else runs.get(session, row.parent)
    if parent is None or projects.role(session, caller.person, parent.project) is None:
        return None
    return parent.held_out_loss


def _failure(session: Session, row: tables.RunRow) -> Failure | None:
    if row.state != RunState.FAILED:
        return None
    units = [unit.unit for unit in runs.units(session, row.id)]
    return Failure.of(failure_of(row.progress, units, row.document))


def _forecast(context: ServiceContext, session: Session, row: tables.RunRow) -> Forecast | None:
    plan = planned_run(row.estimate) if row.state in (RunState.STARTING, RunState.RUNNING) else None
    if plan is None:
        return None
    stages = [
        StageState(name, stage["status"], stage["started"], stage["seconds"])
        for name, stage in row.progress.get("stages", {}).items()
    ]
    units = [
        UnitState(
            unit.stage, unit.status == "done", step=unit.step, steps=unit.steps, started=unit.started, ended=unit.ended
        )
        for unit in runs.units(session, row.id)
    ]
    found = forecast(plan, stages, units, now=context.now(), spent=row.dollars)
    return None if found is None else Forecast.of(found)


def unreadable_report(row: tables.RunRow, why: str) -> RunReport:
    """Report of a run whose documents or files this version cannot read: its name, cost and state, and why."""
    state: dict[str, Any] = {RunState.SUCCEEDED: "finished", RunState.FAILED: "failed", RunState.CANCELLED: "stopped"}
    seed = row.document.get("seed")
    return RunReport(
        name=row.name,
        seed=seed if isinstance(seed, int) else 0,
        tags=row.tags,
        family="unknown",
        stages=[],
        tokens=0,
        bill=bare_bill(row.dollars, planned=False),
        curves={},
        versions={},
        state=state.get(RunState(row.state), "running"),
        state_reason=why,
    )


def bare_bill(dollars: float | None, *, planned: bool) -> Bill:
    """A bill without lines, if only its total is known."""
    bare = make_bill((), seconds=None, planned=planned, complete=False)
    return bare.model_copy(update={"dollars": dollars, "dollars_with_idle": dollars})


def series_answer(curve: UnitCurve) -> Series:
    """Response body for one curve of a metric."""
    return Series(
        unit=curve.unit,
        stage=curve.stage,
        step=curve.steps,
        tokens=curve.tokens,
        value=curve.values,
        points=curve.count,
    )


@dataclasses.dataclass(frozen=True)
class _Shared:
    """Places in the queue, sizes and projects of several runs, and the stages taken from others, each by id."""

    places: Mapping[str, int]
    sizes: Mapping[str, int | None]
    projects: Mapping[str, RunProject]
    taken: Mapping[str, frozenset[str]]


def _shared(session: Session, caller: Caller, rows: Sequence[tables.RunRow]) -> _Shared:
    found = {row.project for row in rows}
    roles = projects.roles(session, caller.person, found)
    named = {
        row.id: RunProject(id=row.id, name=row.name, owner=row.owner, role=roles[row.id])
        for row in projects.by_id(session, found)
    }
    taken = reuse.taken_stages(session, [row.id for row in rows])
    return _Shared(_places(session, rows), sharers.sizes(session, rows), named, taken)


def _places(session: Session, rows: Sequence[tables.RunRow]) -> dict[str, int]:
    if not any(row.state == RunState.QUEUED for row in rows):
        return {}
    return {run_id: place for place, run_id in enumerate(runs.queue_order(session), 1)}


def _run(context: ServiceContext, caller: Caller, row: tables.RunRow, shared: _Shared) -> dict[str, Any]:
    stages: dict[str, dict[str, Any]] = row.progress.get("stages", {})
    return {
        **{name: getattr(row, name) for name in _SAME},
        "project": shared.projects[row.project],
        "position": shared.places.get(row.id) if row.state == RunState.QUEUED else None,
        "stages": [{"name": name, **stage} for name, stage in stages.items()],
        "money": {
            "dollars": row.dollars,
            "worker_seconds": row.worker_seconds,
            "estimate_dollars": _planned_dollars(row, shared.taken.get(row.id)),
            "budget_dollars": row.budget_dollars,
        },
        "disk_bytes": shared.sizes[row.id],
        "results": {name: getattr(row, name) for name in Results.model_fields},
        "events": row.next_position,
        "notice": row.unreadable or row.trouble,
        "job_url": context.settings.job_url(submission_id(row.id, row.attempt))
        if caller.admin and row.attempt
        else None,
    }


def _planned_dollars(row: tables.RunRow, taken: frozenset[str] | None) -> float | None:
    bill = row.estimate.get("bill") or {}
    # Only a retry that took stages needs its lines: a list has many runs.
    return dollars_without(Bill.model_validate(bill), taken) if bill and taken else bill.get("dollars")


_SAME = tuple(
    Run.model_fields.keys()
    - {"project", "position", "stages", "money", "results", "disk_bytes", "events", "job_url", "notice"}
)
