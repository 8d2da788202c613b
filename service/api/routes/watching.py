"""Routes to watch a run (events, metrics, report, logs), and the route to which its driver posts events."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import from_json
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from moedisco_ray.core.driver_proofs import secrets_place
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.sealed import seal
from service.api import streams
from service.api.answers import series_answer
from service.api.bodies import RawBody
from service.api.context import InContext, ServiceContext
from service.api.drivers import DRIVER, Driver, check_driver
from service.api.logs import follow as follow_file
from service.api.logs import list_logs as logs_in
from service.api.logs import open_log, tail_start
from service.api.openapi import body_of, content, problems
from service.api.parameters import After, Flag, LastEventId, RunId
from service.api.problems import problem_response
from service.api.reports import document_of, report_of_run
from service.api.responses import ClosedStream, EventStream
from service.api.security import SIGNED_IN, STREAM_SLOT, Reader, run_for, still_allowed
from service.database import audit, ingest, metrics, policies, project_secrets, runs, tables
from service.domain.states import TERMINAL, RunState
from service.errors import BadRequest, Conflict, NotFound
from service.run_storage import storage_of
from service.schemas import Figure, LogPage, Metrics, Report, ReportAnswer, Unit, UnitPage

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["watching"], dependencies=SIGNED_IN)
reports = APIRouter(prefix="/v1/runs/{run_id}", tags=["watching"], dependencies=DRIVER)
_Units = Annotated[list[str], Query(max_length=256, description="Units to include; by default all.")]
_DECISIVE = frozenset({"run_started", "run_finished", "run_failed", "run_stopped"})
_MOST_LINES = 100_000
_MESSAGE = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "id": {"type": "string", "description": "Position in the stream; absent in the last message."},
        "event": {"type": "string", "description": "Type of the event, or `end`."},
        "data": {"type": "string", "description": "The event as JSON."},
    },
}
"""Schema of a server-sent message."""


def find_run(run_id: RunId, caller: Reader, context: InContext) -> tables.RunRow:
    """The run whose id is in the URL path, if the caller may see it."""
    with context.database.read() as session:
        return run_for(session, caller, run_id)


VisibleRun = Annotated[tables.RunRow, Depends(find_run)]


@router.get(
    "/events",
    response_class=EventStream,
    dependencies=[STREAM_SLOT],
    responses=problems(404)
    | {200: content("text/event-stream", "Messages of this form; the last one has the event `end`.", _MESSAGE)},
)
async def stream_events(
    run: VisibleRun,
    caller: Reader,
    context: InContext,
    after: After = None,
    last_event_id: LastEventId = None,
    follow: Annotated[Flag, Query(description="Whether to wait for new events until the run has ended.")] = True,
) -> EventStream:
    """Stream a run's events live from any position. A reader that reconnects with its last id misses nothing."""
    position = last_event_id if last_event_id is not None else -1 if after is None else after
    allowed = partial(still_allowed, caller, context, run.id)
    messages = context.streams.follow(run.id, position, allowed) if follow else context.streams.replay(run.id, position)
    return EventStream(messages, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


@reports.post(
    "/report",
    response_model=ReportAnswer,
    responses=problems(400, 404, 410, body=True),
    openapi_extra=body_of("Report"),
)
def report_events(run_id: RunId, body: RawBody, request: Request, context: InContext) -> Response:
    """Store lines of the driver's `events.jsonl`.

    Only drivers of the run may call this; both sides sign what they send.
    """
    driver = check_driver(request, context, run_id, body)
    report = _report(body)
    events = [Event(**vars(reported)) for reported in report.events]
    now = context.now()
    with context.database.write() as session:
        run = runs.lock(session, run_id)
        if driver.attempt > run.attempt if run is not None else not audit.mentions(session, run_id):
            # The operator named another database, or restored an older one. The driver must outlast that.
            raise NotFound("the service's database does not know this driver")
        if run is None or not driver.drives(run):
            return driver.dismissed(request)
        if report.begin is not None:
            ingest.rewind(session, run, report.begin)
        before = run.next_seq
        following = ingest.take(session, run, report.first, events, now)
        prices = policies.prices_of(session, run)
        try:
            given = _sealed_secrets(session, context, run, driver) if report.secrets else None
        except Conflict as error:
            return driver.signed(problem_response(error, request))
    context.prometheus.reported.inc(following - before)
    context.notifier.notify(run_id)
    if any(event.type in _DECISIVE for event in events):
        context.wake_reconciler()
    return driver.signed(
        JSONResponse(ReportAnswer(next=following, prices=prices, secrets=given).model_dump(exclude_defaults=True))
    )


@router.get("/metrics", responses=problems(404))
def get_metrics(
    run: VisibleRun,
    context: InContext,
    figure: Annotated[Figure, Query(description="Figure (training metric) of the curves.")] = "loss",
    unit: _Units = [],  # noqa: B006 - FastAPI copies it
    points: Annotated[int, Query(ge=2, le=10_000, description="Maximum number of points per curve.")] = 1000,
) -> Metrics:
    """Get training curves, downsampled so that minima and maxima are preserved."""
    with context.database.read() as session:
        curves = metrics.series(session, run.id, figure, unit or None, points)
    return Metrics(figure=figure, series=[series_answer(curve) for curve in curves])


@router.get("/submodels", responses=problems(404))
def list_submodels(run: VisibleRun, context: InContext) -> UnitPage:
    """List the units of a run: the seed, each sub-model and the fine-tune."""
    with context.database.read() as session:
        return UnitPage(items=[Unit.of(row) for row in runs.units(session, run.id)])


@router.get("/clusters", responses=problems(404))
def get_clusters(run: VisibleRun) -> dict[str, Any]:
    """Get the report of the document clustering: the clusters and their contents."""
    return document_of(run, "clusters/report.json", "clusters")


@router.get("/report", response_model_exclude_unset=True, responses=problems(404, 409))
def get_report(run: VisibleRun, context: InContext) -> RunReport:
    """Get the cost and results of a run by stage; while the run is active, only of the stages that have finished.

    If this version cannot read the run or its report, only its name, cost and state are given, and `state_reason` says
    why.
    """
    return report_of_run(context, run)


@router.get("/logs", responses=problems(404))
def list_logs(run: VisibleRun) -> LogPage:
    """List the logs of a run: one for the driver, and one for each training worker."""
    return LogPage(items=logs_in(storage_of(run.location)))


@router.get(
    "/logs/{name}",
    response_class=ClosedStream,
    dependencies=[STREAM_SLOT],
    responses=problems(404)
    | {200: content("text/plain", "The last lines, and new lines with `follow`.", {"type": "string"})},
)
async def get_log(
    run: VisibleRun,
    name: str,
    caller: Reader,
    context: InContext,
    tail: Annotated[int, Query(ge=0, le=_MOST_LINES, description="Number of last lines to start with.")] = 200,
    follow: Annotated[Flag, Query(description="Whether to wait for new lines until the run has ended.")] = False,
) -> Response:
    """Read the end of a log, and follow it if requested."""
    found = await run_in_threadpool(lambda: open_log(storage_of(run.location), name))
    start = await run_in_threadpool(tail_start, found.file, found.size, tail)

    def ended() -> bool:
        return not follow or _has_ended(context, run.id)

    checked = asyncio.get_running_loop().time()

    async def pause(seconds: float) -> bool:
        nonlocal checked
        await asyncio.sleep(seconds)
        now = asyncio.get_running_loop().time()
        if now - checked > streams.RECHECK_SECONDS:
            checked = now
            if not await run_in_threadpool(still_allowed, caller, context, run.id):
                return False
        return not context.streams.closing

    return ClosedStream(
        follow_file(found.file, start, ended, pause),
        media_type="text/plain; charset=utf-8",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def _sealed_secrets(session: Session, context: ServiceContext, run: tables.RunRow, driver: Driver) -> str:
    """The secrets that a run names, which only its driver can read."""
    found = project_secrets.for_driver(session, context.secrets_key, run)
    return seal(driver.key, secrets_place(driver.nonce), json.dumps(found))


def _report(body: bytes) -> Report:
    try:
        return Report.model_validate(from_json(body))
    except ValidationError as error:
        raise RequestValidationError(
            [{**mistake, "loc": ("body", *mistake["loc"])} for mistake in error.errors()]
        ) from error
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error


def _has_ended(context: ServiceContext, run_id: str) -> bool:
    with context.database.read() as session:
        run = runs.get(session, run_id)
    return run is None or RunState(run.state) in TERMINAL
