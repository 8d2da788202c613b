"""Health, metrics and the audit log, for operators."""

from __future__ import annotations

import math

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from service.api.context import InContext, ServiceContext
from service.api.openapi import content, problems
from service.api.parameters import Cursor, Limit
from service.api.security import SIGNED_IN, Admin
from service.database import audit, gauges, leases, policies, runs
from service.errors import DatabaseError
from service.schemas import AuditEntry, AuditPage, Health

router = APIRouter(tags=["operations"])


@router.get("/v1/audit", responses=problems(), dependencies=SIGNED_IN)
def list_audit(caller: Admin, context: InContext, cursor: Cursor = None, limit: Limit = 50) -> AuditPage:
    """List the audit log, newest entries first."""
    del caller
    with context.database.read() as session:
        rows, following = audit.page(session, cursor=cursor, limit=limit)
        return AuditPage(items=[AuditEntry.of(row) for row in rows], next_cursor=following)


@router.get("/healthz")
def healthz() -> Health:
    """Whether the process is alive."""
    return Health(status="ok", checks={})


@router.get("/readyz", responses={503: {"model": Health, "description": "A part of the service does not answer."}})
def readyz(context: InContext, response: Response) -> Health:
    """Whether the service can work: Ray answers, and the database answers and has this version's tables.

    If the service works, but some runs, policies or a background loop fail, the status is 200 with `degraded`: a load
    balancer must keep the service, because the other runs need it.
    """
    parts = {"database": _database(context), "ray": "ok" if context.pools.read().connected else "does not answer"}
    if any(word != "ok" for word in parts.values()):
        response.status_code = 503
        return Health(status="unavailable", checks=parts)
    checks = {"runs": _runs(context), "policies": _policies(context), **context.loops()}
    healthy = all(word == "ok" for word in checks.values())
    return Health(status="ok" if healthy else "degraded", checks=parts | checks)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: content("text/plain", "Metrics in the format of Prometheus.", {"type": "string"})},
)
def get_figures(context: InContext) -> Response:
    """Metrics of the service for Prometheus."""
    metrics, now = context.prometheus, context.now()
    with context.database.read() as session:
        for state, count in runs.state_counts(session).items():
            metrics.runs.labels(state.value).set(count)
        metrics.dollars.set(runs.metered_dollars(session))
        metrics.troubled.set(runs.troubled(session))
        metrics.queue_age.set(gauges.queue_age(session, now))
        if context.settings.webhook_url is not None:
            metrics.waiting_messages.set(gauges.waiting_messages(session, now - gauges.GIVE_UP_SECONDS))
        ages = leases.ages(session)
    metrics.reconciler_age.set(ages.get(leases.ROUND, math.nan))
    metrics.backup_age.set(ages.get(leases.BACKUP, math.nan))
    for name, found in context.loops().items():
        metrics.loops.labels(name).set(found == "ok")
    for kind, places in context.planning.places.items():
        metrics.planning_waiting.labels(kind).set(places.waiting)
    return Response(generate_latest(context.prometheus.registry), media_type=CONTENT_TYPE_LATEST)


def _runs(context: ServiceContext) -> str:
    with context.database.read() as session:
        troubled = runs.troubled(session)
    if not troubled:
        return "ok"
    return f"{troubled} {'run' if troubled == 1 else 'runs'} cannot be processed; `moedisco list` says which, and why"


def _policies(context: ServiceContext) -> str:
    with context.database.read() as session:
        unreadable = len(policies.load(session).unreadable)
    if not unreadable:
        return "ok"
    found = (
        "1 policy cannot be read, and allows" if unreadable == 1 else f"{unreadable} policies cannot be read, and allow"
    )
    return f"{found} nothing; the service's log says which: set it again with `moedisco policies`"


def _database(context: ServiceContext) -> str:
    try:
        context.database.check()
    except DatabaseError as error:
        return str(error)
    return "ok"
