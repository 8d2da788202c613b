"""The shared objects that endpoints use: settings, database, clients, limits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Annotated

from fastapi import Depends, Request

from service.api.limits import Capacity, RateLimiter, StreamSlots
from service.api.live_reports import LiveReports
from service.api.streams import Streams
from service.database.session import Database
from service.dataset_store import DatasetStore
from service.domain.path_sandbox import Roots
from service.notifier import Notifier
from service.observability import PrometheusMetrics
from service.planning.pool import PlanningPool
from service.ray_side.jobs import RayJobs
from service.ray_side.pages import RayPages
from service.ray_side.pools import RayPools
from service.settings import Settings


@dataclasses.dataclass(frozen=True)
class ServiceContext:
    """Shared objects of a service process, passed to its endpoints.

    Attributes:
        jobs: Client for Ray Jobs; used only to delete the jobs of a deleted run.
        datasets: Files of data sets.
        planning: Processes that check and plan requested runs.
        pools: Pools of the Ray cluster.
        ray_pages: Pages of the Ray dashboard, for administrators.
        notifier: Receives a notification of every committed change of a run.
        wake_reconciler: Starts the next round of the reconciler at once.
        streams: Open event streams.
        reports: Reports of active runs.
        limits: Rate limits by token and address.
        sign_in_limits: Rate limits of failed sign-ins by address.
        stream_slots: Slots for long responses, by token.
        capacity: Limits derived from the number of file descriptors.
        prometheus: Metrics for Prometheus.
        secret: Secret from which the drivers' keys are derived.
        secrets_key: Key with which the secrets of projects are sealed.
        roots: Directories and buckets that runs may read and write.
        now: Returns seconds since the epoch.
        loops: Returns the state of each background loop by name: `ok`, or how its last round failed.
    """

    settings: Settings
    database: Database
    jobs: RayJobs
    datasets: DatasetStore
    planning: PlanningPool
    pools: RayPools
    ray_pages: RayPages
    notifier: Notifier
    wake_reconciler: Callable[[], None]
    streams: Streams
    reports: LiveReports
    limits: RateLimiter
    sign_in_limits: RateLimiter
    stream_slots: StreamSlots
    capacity: Capacity
    prometheus: PrometheusMetrics
    secret: bytes = dataclasses.field(repr=False)
    secrets_key: bytes = dataclasses.field(repr=False)
    roots: Roots
    now: Callable[[], float] = time.time
    loops: Callable[[], Mapping[str, str]] = dict

    def notify(self, run_id: str) -> None:
        """Wake the event streams of a changed run, and the reconciler."""
        self.notifier.notify(run_id)
        self.wake_reconciler()


async def of(request: Request) -> ServiceContext:
    """Context of the request's application.

    It is async because FastAPI runs other functions in a thread, which costs more.
    """
    context: ServiceContext = request.app.state.context
    return context


InContext = Annotated[ServiceContext, Depends(of)]
