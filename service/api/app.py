"""Assembles the FastAPI application."""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.staticfiles import StaticFiles

from moedisco_ray.core.store.locations import is_uri
from service.api.bodies import BodyLimit
from service.api.compression import CompressedJson
from service.api.context import ServiceContext
from service.api.drivers import check_driver, reported_run
from service.api.envelope import Envelope
from service.api.limits import RateLimiter, StreamSlots, capacity, descriptor_limit
from service.api.live_reports import LiveReports
from service.api.openapi import document, operation_id
from service.api.parameters import check_query
from service.api.problems import handle_problems
from service.api.routes import (
    access,
    comparing,
    datasets,
    files,
    notices,
    operations,
    pages,
    planning,
    projects,
    quotas,
    runs,
    secrets,
    watching,
)
from service.api.security import bearer_token, check_known
from service.api.sessions import session_of
from service.api.streams import Streams
from service.api.sub_path import SubPath
from service.database.session import Database
from service.dataset_store import DatasetStore
from service.driver_user import DriverUser
from service.notifier import Notifier
from service.observability import PrometheusMetrics
from service.planning.pool import PlanningPool
from service.ray_side.dashboard import Dashboard
from service.ray_side.jobs import RayJobs
from service.ray_side.pages import RayPages
from service.ray_side.pools import RayPools
from service.settings import Settings
from service.web import STATIC

ROUTERS = (
    runs.router,
    watching.router,
    watching.reports,
    comparing.router,
    files.router,
    datasets.router,
    planning.router,
    projects.router,
    secrets.router,
    notices.router,
    quotas.router,
    access.router,
    access.sign_ins,
    operations.router,
)

_GUESSES_PER_MINUTE = 20
"""Maximum number of failed sign-ins per minute from one address."""
_MOST_OF_A_TOKEN = 4096
"""Maximum size of a sign-in request (bytes); small, because it is read without authentication."""
_MOST_OF_A_CHANGE = 64 * 2**10
"""Maximum size of a request that is parsed on the event loop (bytes), which meanwhile answers no other one."""
_PLANNED = re.compile(r"/v1/(estimates|runs|runs/[^/]+/retry|policies)")
"""Paths with larger bodies: the first are parsed in other processes, and policies come from administrators."""
_MOST_OF_A_LIST = 4 * 2**20
"""Maximum size of a list of a data set's files (bytes); a thread parses it."""
_STREAMED = re.compile(r"/v1/blobs/[^/]+")


@functools.cache
def api_routes() -> APIRouter:
    """All routes. They depend on no application, and building them takes longer than a request."""
    routes = APIRouter(generate_unique_id_function=operation_id)
    for router in ROUTERS:
        routes.include_router(router, dependencies=[Depends(check_query)])
    # The Ray dashboard has queries of its own, and people's links to pages may have any.
    routes.include_router(pages.router)
    return routes


@functools.cache
def _release() -> str:
    return version("moedisco-ray")


@functools.cache
def _openapi() -> dict[str, Any]:
    return document(api_routes().routes, _release())


def _dataset_store(settings: Settings) -> DatasetStore:
    user = None if settings.driver_user is None else DriverUser.named(settings.driver_user)
    first = settings.output_roots[0]
    return DatasetStore(settings.roots.homes[0], user, str(first) if is_uri(first) else None)


def create_app(
    settings: Settings,
    database: Database,
    jobs: RayJobs,
    *,
    planning: PlanningPool,
    pools: RayPools,
    dashboard: Dashboard,
    notifier: Notifier,
    secret: bytes,
    secrets_key: bytes,
    wake_reconciler: Callable[[], None],
    loops: Callable[[], Mapping[str, str]] = dict,
    prometheus: PrometheusMetrics | None = None,
) -> FastAPI:
    """Create the application. It starts no background work and does not close the objects that it gets as arguments.

    Args:
        settings: Settings of the service.
        database: Migrated database.
        jobs: Client for Ray Jobs.
        planning: Processes that check and plan requested runs.
        pools: Pools of the Ray cluster.
        dashboard: Ray dashboard, whose pages administrators see.
        notifier: Receives a notification of every committed change of a run.
        secret: Secret from which the drivers' keys are derived.
        secrets_key: Key with which the secrets of projects are sealed.
        wake_reconciler: Starts the next round of the reconciler at once.
        loops: Returns the state of each background loop by name; see `ServiceContext`.
        prometheus: Metrics to which the background work adds its own; None for new ones.
    """
    prometheus, limits = prometheus or PrometheusMetrics(), capacity(descriptor_limit())
    context = ServiceContext(
        settings=settings,
        database=database,
        jobs=jobs,
        datasets=_dataset_store(settings),
        planning=planning,
        pools=pools,
        ray_pages=RayPages(dashboard),
        notifier=notifier,
        wake_reconciler=wake_reconciler,
        streams=Streams(database, notifier, prometheus),
        reports=LiveReports(),
        limits=RateLimiter(settings.requests_per_minute),
        sign_in_limits=RateLimiter(_GUESSES_PER_MINUTE),
        stream_slots=StreamSlots(limits.streams, settings.max_streams_per_token),
        capacity=limits,
        prometheus=prometheus,
        secret=secret,
        secrets_key=secrets_key,
        roots=settings.roots,
        loops=loops,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        context.streams.close()

    app = FastAPI(
        title="MoEDisCo control service",
        version=_release(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        generate_unique_id_function=operation_id,
        separate_input_output_schemas=False,
    )
    app.state.context = context
    served = {"servers": [{"url": settings.path}]} if settings.path else {}
    app.openapi = lambda: _openapi() | served  # type: ignore[method-assign]
    handle_problems(app)
    app.router.routes.extend(api_routes().routes)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")

    def limit_of(path: str) -> int:
        if path == "/v1/session":
            return _MOST_OF_A_TOKEN
        if reported_run(path) is not None:
            return settings.max_report_bytes
        if path == "/v1/datasets":
            return _MOST_OF_A_LIST
        return settings.max_body_bytes if _PLANNED.fullmatch(path) else min(_MOST_OF_A_CHANGE, settings.max_body_bytes)

    def check(request: Request) -> None:
        run_id = reported_run(request.scope["path"])
        if run_id is None:
            check_known(request, context)
        else:
            check_driver(request, context, run_id)

    def credential_of(request: Request) -> str | None:
        named = None if settings.sign_in_header is None else request.headers.get(settings.sign_in_header)
        return bearer_token(request) or session_of(request, settings) or named

    app.add_middleware(BodyLimit, limit_of=limit_of, check=check, credential_of=credential_of, streamed=_STREAMED)
    app.add_middleware(CompressedJson)
    app.add_middleware(Envelope, prometheus=prometheus)
    if settings.path:
        app.add_middleware(SubPath, path=settings.path)
    return app
