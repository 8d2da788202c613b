"""Route that puts runs next to each other."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy.orm import Session

from moedisco_ray.core.records.metered import metered_bill
from moedisco_ray.core.records.run_record import RunReport
from service.api.answers import unreadable_report
from service.api.bodies import StrictRoute
from service.api.context import InContext, ServiceContext
from service.api.openapi import problems
from service.api.reports import report_of_run
from service.api.security import SIGNED_IN, Caller, Reader, run_for
from service.database import tables
from service.domain import comparison
from service.errors import InvalidRequest, NotFound, UnusableRun
from service.schemas import (
    ComparedRun,
    Comparison,
    SampleComparison,
    SettingDifference,
    SourceComparison,
    StageComparison,
)

router = APIRouter(prefix="/v1", tags=["watching"], route_class=StrictRoute, dependencies=SIGNED_IN)

_Runs = Annotated[
    list[str],
    Query(min_length=2, max_length=comparison.MOST_RUNS, description="Ids of the runs, in the order of the answer."),
]


@router.get("/comparison", responses=problems(404, 409))
def compare_runs(run: _Runs, caller: Reader, context: InContext) -> Comparison:
    """Compare two to five runs: what differs in their settings, stages, cost, held-out figures and samples."""
    if len(set(run)) < len(run):
        raise InvalidRequest([("query.run", "names a run twice; name different runs")])
    with context.database.read() as session:
        rows = [_row(session, caller, run_id) for run_id in run]
    reports = [_report(context, row) for row in rows]
    settings = comparison.differing([row.document for row in rows])
    return Comparison(
        runs=[_compared(row, report) for row, report in zip(rows, reports, strict=True)],
        same_text=comparison.same_text(settings, reports),
        settings=[SettingDifference(**dataclasses.asdict(each)) for each in settings],
        stages=[StageComparison(**dataclasses.asdict(each)) for each in comparison.compared_stages(reports)],
        sources=[SourceComparison(**dataclasses.asdict(each)) for each in comparison.compared_sources(reports)],
        samples=[SampleComparison(**dataclasses.asdict(each)) for each in comparison.compared_samples(reports)],
    )


def _row(session: Session, caller: Caller, run_id: str) -> tables.RunRow:
    row = run_for(session, caller, run_id)
    # Loaded while the session is open.
    _ = row.config, row.meter
    return row


def _report(context: ServiceContext, row: tables.RunRow) -> RunReport:
    try:
        return report_of_run(context, row)
    except NotFound as error:
        return unreadable_report(row, str(error))


def _compared(row: tables.RunRow, report: RunReport) -> ComparedRun:
    result = comparison.result_of(report)
    try:
        seconds = metered_bill(row.usage, row.settings).seconds
    except UnusableRun:
        seconds = None
    return ComparedRun(
        id=row.id,
        name=row.name,
        owner=row.owner,
        state=row.state,
        tags=row.tags,
        dollars=row.dollars,
        seconds=seconds,
        tokens=report.tokens,
        loss=None if result is None else result.loss,
        perplexity=None if result is None else result.perplexity,
        bits_per_byte=None if result is None else result.bits_per_byte,
    )
