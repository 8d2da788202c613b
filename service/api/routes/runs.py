"""Creating, listing, changing and stopping runs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from service import run_homes
from service.api.answers import run_answers, run_detail
from service.api.bodies import RawBody, StrictRoute
from service.api.context import InContext, ServiceContext
from service.api.listing import ListCursor, Listed, OrderBy
from service.api.openapi import ETAG, Responses, body_of, links, problems, versioned
from service.api.parameters import Flag, IdempotencyKey, IfMatch, Limit, RunId, check_match, etag
from service.api.security import SIGNED_IN, Caller, Reader, Submitter, project_for, run_for
from service.api.submission import estimated, note, policy_of, submit
from service.database import audit, policies, projects, quotas, run_list, runs, tables, values
from service.domain import tags
from service.domain.access import Person
from service.domain.jobs import submission_id
from service.domain.outcome import STOP_REASONS, Stop
from service.domain.quotas import check_priority, check_queue
from service.domain.run_list import NEWEST, parse_order
from service.domain.run_paths import RunPaths, home_of
from service.domain.states import ACTIVE, TERMINAL, RunState
from service.errors import AgainstPolicy, Conflict, Forbidden, IllegalTransition, NotFound, RayUnavailable
from service.observability import logger
from service.schemas import CancelRequest, RetryEstimate, RunChange, RunDetail, RunPage

_log = logger(__name__)
router = APIRouter(prefix="/v1/runs", tags=["runs"], route_class=StrictRoute, dependencies=SIGNED_IN)

_ABOUT_RUN = (
    "get_run",
    "change_run",
    "cancel_run",
    "resume_run",
    "retry_run",
    "estimate_retry",
    "delete_run",
    "get_metrics",
    "list_submodels",
    "get_report",
    "list_logs",
    "list_artifacts",
)
_MADE: Responses = {
    201: {
        "description": "The run, queued.",
        "links": links(*_ABOUT_RUN),
        "headers": ETAG | {"Location": {"description": "Path of the run.", "schema": {"type": "string"}}},
    }
}
_READ, _ACCEPTED = versioned(200, "The run."), versioned(202, "The run, in its new state.")


@router.post("", status_code=201, responses=_MADE | problems(404, 409, body=True), openapi_extra=body_of("RunRequest"))
async def submit_run(
    body: RawBody,
    request: Request,
    response: Response,
    caller: Submitter,
    context: InContext,
    idempotency_key: IdempotencyKey = None,
) -> RunDetail:
    """Queue a run. With an Idempotency-Key the request can be repeated and returns the same run."""
    row, new = await submit(context, caller, body, key=idempotency_key)
    return await _made(context, caller, row, new=new, request=request, response=response)


@router.get("", responses=problems())
def list_runs(
    caller: Reader,
    context: InContext,
    listed: Listed,
    order_by: OrderBy = str(NEWEST),
    cursor: ListCursor = None,
    limit: Limit = 50,
) -> RunPage:
    """List runs in any order: those in the caller's projects, or all of them for an administrator."""
    order = parse_order(order_by)
    with context.database.read() as session:
        rows, following = run_list.page(session, listed, order=order, cursor=cursor, limit=limit)
        return RunPage(items=run_answers(context, caller, session, rows), next_cursor=following)


@router.get("/{run_id}", responses=_READ | problems(404))
def get_run(run_id: RunId, response: Response, caller: Reader, context: InContext) -> RunDetail:
    """Get the current state of a run."""
    with context.database.read() as session:
        return _answer(context, caller, session, run_for(session, caller, run_id), response)


@router.patch("/{run_id}", responses=_READ | problems(404, 409, 412, body=True))
def change_run(
    run_id: RunId, body: RunChange, response: Response, caller: Submitter, context: InContext, if_match: IfMatch = None
) -> RunDetail:
    """Change a run.

    The priority only matters while the run is queued; a new budget applies at once, and null removes it.

    `tags` is a merge patch: null removes a tag, and those not named stay. `kept: true` exempts a run from retention. An
    empty `note` removes the note.
    """
    changes = {name: value for name, value in body if value is not None}
    if body.note is not None:
        changes["note"] = values.text(body.note).strip() or None
    if "budget_dollars" in body.model_fields_set:
        changes["budget_dollars"] = body.budget_dollars
    now = context.now()
    policy = policy_of(context, caller)
    with context.database.write() as session:
        run = run_for(session, caller, run_id, "edit", lock=True)
        check_match(if_match, run.version)
        if body.priority is not None and body.priority > run.priority:
            check_priority(body.priority, policy)
        if body.project is not None:
            changes["project"] = _project_to_move_to(session, caller, run, body.project)
        if body.tags is not None:
            changes["tags"] = tags.patched(run.tags, body.tags)
        if body.kept:
            changes["expires_at"] = None
        if changes:
            runs.amend(session, run, now=now, **changes)
            note(session, caller, "run.change", run_id, now=now, detail=changes)
        answer = _answer(context, caller, session, run, response)
    context.notify(run_id)
    return answer


@router.delete("/{run_id}", status_code=204, responses=problems(404, 409, 412))
def delete_run(
    run_id: RunId,
    caller: Submitter,
    context: InContext,
    if_match: IfMatch = None,
    keep_artifacts: Annotated[Flag, Query(description="Whether to keep the run's files.")] = False,
) -> None:
    """Delete a run with its history and files.

    An active run must be cancelled first. Runs that start from this run and have not succeeded must be deleted first.
    """
    now = context.now()
    with context.database.write() as session:
        run = run_for(session, caller, run_id, "edit", lock=True)
        check_match(if_match, run.version)
        if RunState(run.state) in ACTIVE:
            raise Conflict(f"the run is {run.state}; cancel it, then delete it")
        if (reader := runs.starts(session, run_id).get(run_id)) is not None:
            raise Conflict(_held_by(session, caller, reader))
        if keep_artifacts and policies.of(session, run.owner).disk_bytes is not None and not caller.admin:
            raise AgainstPolicy("keep_artifacts", "true", "is not allowed while your disk is limited; leave it out")
        runs.delete(session, run)
        note(
            session,
            caller,
            "run.delete",
            run_id,
            now=now,
            detail={"name": run.name, "keep_artifacts": keep_artifacts, **audit.storage_detail(run.storage)},
        )
    context.notify(run_id)
    # Errors below are ignored: the run is already deleted, and the rest can be cleaned up by hand.
    with contextlib.suppress(RayUnavailable):
        for attempt in range(1, run.attempt + 1):
            context.jobs.delete(submission_id(run.id, attempt))
    if not keep_artifacts:
        _delete_files(context, run)
    if run.storage is not None:  # without the run, checkpoints are of no use
        try:
            run_homes.remove_storage(run.storage, run.id, context.roots.storage)
        except OSError as error:
            _log.warning("checkpoints of the deleted run %s remain until the next sweep: %s", run.id, error)


@router.post("/{run_id}/cancel", status_code=202, responses=_ACCEPTED | problems(404, 409, 412, body=True))
def cancel_run(
    run_id: RunId,
    response: Response,
    caller: Submitter,
    context: InContext,
    body: CancelRequest | None = None,
    if_match: IfMatch = None,
) -> RunDetail:
    """Stop a run after a checkpoint; with `force`, within a minute and without one. The request can be repeated."""
    force = body is not None and body.force
    now = context.now()
    with context.database.write() as session:
        run = run_for(session, caller, run_id, "edit", lock=True)
        check_match(if_match, run.version)
        state = RunState(run.state)
        if state in TERMINAL and state is not RunState.CANCELLED:
            raise IllegalTransition(f"the run has already {state.value}")
        stop: Stop = "killed" if force else "cancelled"
        if state is RunState.QUEUED:
            runs.transition(session, run, RunState.CANCELLED, reason=STOP_REASONS["cancelled"], now=now)
        elif state in (RunState.STARTING, RunState.RUNNING):
            runs.transition(session, run, RunState.STOPPING, reason=STOP_REASONS[stop], now=now, stop=stop)
        elif state is RunState.STOPPING and force:
            runs.amend(session, run, now=now, stop=stop, reason=STOP_REASONS[stop])
        if state is not RunState.CANCELLED:
            note(session, caller, "run.cancel", run_id, now=now, detail={"force": force})
        answer = _answer(context, caller, session, run, response)
    context.notify(run_id)
    return answer


@router.post("/{run_id}/resume", status_code=202, responses=_ACCEPTED | problems(404, 409, 412))
def resume_run(
    run_id: RunId, response: Response, caller: Submitter, context: InContext, if_match: IfMatch = None
) -> RunDetail:
    """Queue a failed or cancelled run again; it continues from what it has stored."""
    now = context.now()
    with context.database.write() as session:
        run = run_for(session, caller, run_id, "edit", lock=True)
        check_match(if_match, run.version)
        run.check_readable()
        if run.budget_dollars is not None and run.dollars >= run.budget_dollars:
            raise Conflict(
                f"the run has spent its budget of ${run.budget_dollars:g}; raise budget_dollars first "
                "(`moedisco change RUN --budget DOLLARS`)"
            )
        check_queue(policies.of(session, run.owner), quotas.use_to_change(session, run.owner, now))
        runs.transition(session, run, RunState.QUEUED, reason=None, now=now)
        note(session, caller, "run.resume", run_id, now=now, detail={})
        answer = _answer(context, caller, session, run, response)
    context.notify(run_id)
    return answer


@router.post(
    "/{run_id}/retry",
    status_code=201,
    responses=_MADE | problems(404, 409, 412, body=True),
    openapi_extra=body_of("RetryRequest", required=False),
)
async def retry_run(
    run_id: RunId,
    body: RawBody,
    request: Request,
    response: Response,
    caller: Submitter,
    context: InContext,
    idempotency_key: IdempotencyKey = None,
    if_match: IfMatch = None,
) -> RunDetail:
    """Queue a new run with the configuration of an existing one and the requested changes.

    It takes finished stages that it would make alike from other runs; see `reuse`.

    `If-Match` names the existing one.
    """
    row, new = await submit(context, caller, body, retry_of=run_id, key=idempotency_key, if_match=if_match)
    return await _made(context, caller, row, new=new, request=request, response=response)


@router.post(
    "/{run_id}/retry/estimate",
    response_model=RetryEstimate,
    responses=problems(404, 409, body=True),
    openapi_extra=body_of("RetryRequest", required=False),
)
async def estimate_retry(run_id: RunId, body: RawBody, caller: Reader, context: InContext) -> Response:
    """Estimate a retry: which stages it takes from which run, and its cost with and without them.

    The body is that of the retry. As with other estimates, a newer one takes the place of one that waits.
    """
    return Response(await estimated(context, caller, body, retry_of=run_id), media_type="application/json")


async def _made(
    context: ServiceContext, caller: Caller, row: tables.RunRow, *, new: bool, request: Request, response: Response
) -> RunDetail:
    response.headers["Location"] = context.settings.path + str(request.app.url_path_for("get_run", run_id=row.id))
    if not new:
        response.headers["Idempotency-Replayed"] = "true"
    return await run_in_threadpool(_stored, context, caller, row, response)


def _stored(context: ServiceContext, caller: Caller, row: tables.RunRow, response: Response) -> RunDetail:
    with context.database.read() as session:
        return _answer(context, caller, session, row, response)


def _project_to_move_to(session: Session, caller: Caller, run: tables.RunRow, name: str) -> str:
    """Id of a project, to which the caller may move a run: its owner does not lose sight of it."""
    found = project_for(session, caller, name, "edit")
    projects.hold(session, found.id)
    if not caller.admin and projects.role(session, Person(run.owner), found.id) is None:
        raise Forbidden(f"the run is {run.owner}'s, who is not in this project; ask its owner to add {run.owner}")
    return found.id


def _answer(
    context: ServiceContext, caller: Caller, session: Session, row: tables.RunRow, response: Response
) -> RunDetail:
    response.headers["ETag"] = etag(row.version)
    return run_detail(context, caller, session, row)


def _held_by(session: Session, caller: Caller, reader: str) -> str:
    """Why a run cannot be deleted that another run starts from, whose id only those get who may see it."""
    with contextlib.suppress(NotFound):
        run_for(session, caller, reader)
        return f"run {reader} starts from this run and has not succeeded; delete {reader} first"
    return "a run of another project starts from this run and has not succeeded; ask an administrator"


def _delete_files(context: ServiceContext, run: tables.RunRow) -> None:
    home = RunPaths(Path(run.directory)).home
    with context.database.read() as session:
        other = runs.inside(session, home, run.id)
    try:
        aside = run_homes.set_aside(home, run.id, context.roots.homes, other)
        run_homes.remove_run(aside, run.id, home_of(run.location), context.roots.output_buckets)
    except OSError as error:
        _log.warning("files of the deleted run %s remain: %s", run.id, error)
