"""What every endpoint works with."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request

from service.api.limits import Capacity, RateLimiter, StreamSlots
from service.api.live_reports import LiveReports
from service.api.streams import Streams
from service.database.session import Database
from service.domain.path_sandbox import Roots
from service.notifier import Notifier
from service.observability import PrometheusMetrics
from service.ray_side.jobs import Jobs
from service.ray_side.pages import RayPages
from service.ray_side.pools import PoolReader
from service.ray_side.trainings import TrainingReader
from service.settings import Settings


@dataclasses.dataclass(frozen=True)
class ServiceContext:
    """The parts of the service, put together once.

    Attributes:
        settings: What the operator set.
        database: Where everything is.
        jobs: Ray's jobs; asked only where an operator's wish cannot wait for the reconciler.
        pools: Ray's machines.
        trainings: What Ray Train says of runs.
        ray_pages: The Ray dashboard, read for administrators.
        notifier: Rung after every transaction that tells a run's readers something.
        wake_reconciler: Makes the reconciler look now.
        streams: The open event streams.
        reports: Reports of runs under way.
        limits: Who asked how often.
        guesses: Which address failed to sign in how often.
        places: Long answers under way, by token.
        capacity: What the process's file descriptors allow.
        prometheus: For Prometheus.
        roots: Where runs may read and write.
        now: Seconds since the epoch.
    """

    settings: Settings
    database: Database
    jobs: Jobs
    pools: PoolReader
    trainings: TrainingReader
    ray_pages: RayPages
    notifier: Notifier
    wake_reconciler: Callable[[], None]
    streams: Streams
    reports: LiveReports
    limits: RateLimiter
    guesses: RateLimiter
    places: StreamSlots
    capacity: Capacity
    prometheus: PrometheusMetrics
    roots: Roots
    now: Callable[[], float] = time.time

    def notify(self, run_id: str) -> None:
        """After a transaction changed a run: wake its readers and the reconciler."""
        self.notifier.notify(run_id)
        self.wake_reconciler()


async def of(request: Request) -> ServiceContext:
    """The context of the application that the request came to; async, since a thread of its own would cost more than it does."""
    context: ServiceContext = request.app.state.context
    return context


InContext = Annotated[ServiceContext, Depends(of)]
