"""Logs with request and run ids, and the figures that Prometheus collects."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from structlog.typing import Processor

LogFormat = Literal["console", "json"]
_SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
)


def configure_logging(form: LogFormat, level: int = logging.INFO) -> None:
    """Send the logs of the service and of its libraries to standard error, one line each.

    Args:
        form: Lines for people, or JSON for machines.
        level: The least that is written.
    """
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    render: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()] if form == "json"
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=list(_SHARED), processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render]))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = name != "uvicorn.access"    # the middleware writes one line per request
    for name in ("httpx", "httpcore", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.WARNING)


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger; what `bound` sets is on each of its lines."""
    made: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return made


@contextlib.contextmanager
def bound(**values: Any) -> Iterator[None]:
    """Put values, such as `run_id`, on every line that is logged inside."""
    with structlog.contextvars.bound_contextvars(**values):
        yield


class Figures:
    """What Prometheus collects; one set per application, so that two in one process do not meet.

    Attributes:
        registry: Holds all of them.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "moedisco_http_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry)
        self.seconds = Histogram(
            "moedisco_http_request_seconds", "Time to the first byte of the answer.", ("route",), registry=self.registry)
        self.streams = Gauge("moedisco_event_streams", "Event streams that are open.", registry=self.registry)
        self.reported = Counter("moedisco_reported_events", "Events that drivers reported.", registry=self.registry)
        self.runs = Gauge("moedisco_runs", "Runs by state.", ("state",), registry=self.registry)
        self.dollars = Gauge("moedisco_metered_dollars", "Metered so far, over all runs.", registry=self.registry)
