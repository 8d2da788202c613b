"""Structured logs with request and run ids, and metrics for Prometheus."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from structlog.typing import EventDict, Processor

from moedisco_ray.core.printable import one_line, printed

LogFormat = Literal["console", "json"]
_MINUTE, _HOUR = 60.0, 3600.0
_MOST_KINDS = 1000
"""Number of different exceptions whose repetitions are counted."""
_LIBRARIES = frozenset({"uvicorn.error", "asyncio"})
_KIND_LETTERS = 40
_REFUSALS = frozenset({400, 401, 403, 404, 405, 408, 413, 422, 429, 499, 503})
"""HTTP statuses that unauthenticated clients can cause in any number."""


def _as_one_line(_: object, __: str, record: EventDict) -> EventDict:
    """Keep the message of a record on one line: it may quote a request or a driver."""
    record["event"] = one_line(str(record.get("event", "")))
    return record


_SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
    _as_one_line,
)


def configure_logging(form: LogFormat) -> None:
    """Write the logs of the service and its libraries to standard error, one line per record.

    Args:
        form: `console` for people, `json` for machines.
    """
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    render: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if form == "json"
        # Plain tracebacks: the default of the console prints local variables, which hold tokens. No colours: the stream
        # shows escape sequences, and does not write them.
        else [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)]
    )
    handler = logging.StreamHandler(printed(sys.stderr))
    handler.addFilter(Repeated())
    handler.addFilter(Bounded())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=list(_SHARED),
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = name != "uvicorn.access"  # the middleware already logs each request
    for name in ("httpx", "httpcore", "alembic.runtime.migration"):
        logging.getLogger(name).setLevel(logging.WARNING)


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose lines include the values set by `bound`."""
    made: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return made


@contextlib.contextmanager
def bound(**values: Any) -> Iterator[None]:
    """Add values, such as `run_id`, to every line logged inside the block."""
    with structlog.contextvars.bound_contextvars(**values):
        yield


class Repeated(logging.Filter):
    """Log filter that writes equal exceptions once in full, and then only how often they came again.

    Exceptions are equal if the same logger logs the same type, raised at the same line. The pause between two lines
    about equal exceptions grows from a minute to an hour. An exception that did not come for an hour is new.

    Args:
        clock: Returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[tuple[str, str, str, int], _Repetition] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the line; shortens a line about an exception that came before."""
        error = _exception_of(record)
        if error is None:
            return True
        with self._lock:
            again = self._again((record.name, *_origin(error)), self._clock())
        if again:
            _shorten(record, f"again, {again} {'time' if again == 1 else 'times'}: {type(error).__name__}")
        return again is None or again > 0

    def _again(self, kind: tuple[str, str, str, int], now: float) -> int | None:
        """How many exceptions to report again; None for a new one, 0 to write no line."""
        before = self._seen.pop(kind, None)
        if before is None or now - before.last > _HOUR:
            self._seen[kind] = _Repetition(last=now, due=now + _MINUTE, pause=_MINUTE, count=0)
            while len(self._seen) > _MOST_KINDS:
                del self._seen[next(iter(self._seen))]
            return None
        count = before.count + 1
        if now < before.due:
            self._seen[kind] = dataclasses.replace(before, last=now, count=count)
            return 0
        pause = min(2 * before.pause, _HOUR)
        self._seen[kind] = _Repetition(last=now, due=now + pause, pause=pause, count=0)
        return count


@dataclasses.dataclass(frozen=True)
class _Repetition:
    """History of equal exceptions.

    Attributes:
        last: Time at which the exception came last.
        due: Time from which the next line may be written.
        pause: Seconds between that line and the one after it.
        count: Number of exceptions since the last line.
    """

    last: float
    due: float
    pause: float
    count: int


def _exception_of(record: logging.LogRecord) -> BaseException | None:
    info = record.msg.get("exc_info") if isinstance(record.msg, dict) else record.exc_info
    if isinstance(info, BaseException):
        return info
    found = info if isinstance(info, tuple) else sys.exc_info() if info else (None, None, None)
    return found[1]


def _origin(error: BaseException) -> tuple[str, str, int]:
    """Type of an exception, and file and line that raised it."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    file, line = ("", 0) if frame is None else (frame.tb_frame.f_code.co_filename, frame.tb_lineno)
    return type(error).__name__, file, line


def _shorten(record: logging.LogRecord, note: str) -> None:
    if isinstance(record.msg, dict):
        record.msg = {**{key: value for key, value in record.msg.items() if key != "exc_info"}, "note": note}
    else:
        record.msg, record.args = f"{str(record.getMessage()).splitlines()[0]} ({note})", ()
        record.exc_info = record.exc_text = None


class Bounded(logging.Filter):
    """Log filter that limits the lines per minute that unauthenticated clients can cause.

    Lines about refused requests are limited separately for each status code. Messages of uvicorn and asyncio about bad
    requests and failed accepts are limited too. The last line before the limit says that further lines are dropped. The
    Prometheus metrics count every request.

    Args:
        per_minute: Maximum number of lines per minute with the same status, or with the same message of a library.
        clock: Returns monotonic seconds.
    """

    def __init__(self, per_minute: int = 60, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._per_minute = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the line."""
        kind = _bounded_kind(record)
        if kind is None:
            return True
        with self._lock:
            now = self._clock()
            began, count = self._seen.get(kind, (now, 0))
            if now - began >= _MINUTE:
                began, count = now, 0
            self._seen[kind] = (began, count + 1)
        if count + 1 == self._per_minute:
            note = "more lines of this kind are left out until the minute is over"
            record.msg = {**record.msg, "note": note} if isinstance(record.msg, dict) else f"{record.msg} ({note})"
        return count < self._per_minute


def _bounded_kind(record: logging.LogRecord) -> str | None:
    """Name under which lines like this one are counted, such as `status 404`; None if their number is not limited."""
    if record.name in _LIBRARIES:
        return f"{record.name} {str(record.msg)[:_KIND_LETTERS]}"
    status = record.msg.get("status", 0) if isinstance(record.msg, dict) else 0
    return f"status {status}" if status in _REFUSALS else None


class PrometheusMetrics:
    """Metrics for Prometheus; each application in a process has its own set."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "moedisco_http_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "moedisco_http_request_seconds", "Time to the first byte of the answer.", ("route",), registry=self.registry
        )
        self.streams = Gauge("moedisco_event_streams", "Event streams that are open.", registry=self.registry)
        self.closed = Counter(
            "moedisco_connections_closed",
            "Connections closed before the client had finished.",
            ("reason",),
            registry=self.registry,
        )
        self.reported = Counter("moedisco_reported_events", "Events that drivers reported.", registry=self.registry)
        self.runs = Gauge("moedisco_runs", "Runs by state.", ("state",), registry=self.registry)
        self.queue_age = Gauge(
            "moedisco_queue_age_seconds",
            "Seconds since the first of the waiting runs was queued.",
            registry=self.registry,
        )
        self.reconciler_age = Gauge(
            "moedisco_reconciler_age_seconds",
            "Seconds since any replica completed a round of the reconciler; measured every few seconds.",
            registry=self.registry,
        )
        self.lease = Gauge(
            "moedisco_lease_held",
            "1 if this replica does the background work, 0 if another does.",
            registry=self.registry,
        )
        self.backup_age = Gauge(
            "moedisco_backup_age_seconds",
            "Seconds since the last `moedisco backup`; NaN if none was made.",
            registry=self.registry,
        )
        self.messages = Counter(
            "moedisco_end_messages", "Messages about ends of runs, by answer.", ("answer",), registry=self.registry
        )
        self.waiting_messages = Gauge(
            "moedisco_end_messages_waiting",
            "Ends of runs of the last day that the receiver has not accepted; 0 without a receiver.",
            registry=self.registry,
        )
        self.planning = Histogram(
            "moedisco_planning_seconds",
            "Time to check and plan a request, without the wait for its turn.",
            ("kind",),
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20),
            registry=self.registry,
        )
        self.planning_waiting = Gauge(
            "moedisco_planning_waiting",
            "Requests that wait for their turn to be planned.",
            ("kind",),
            registry=self.registry,
        )
        self.loops = Gauge(
            "moedisco_loop_ok", "1 if the last round of a background loop succeeded.", ("loop",), registry=self.registry
        )
        self.troubled = Gauge(
            "moedisco_troubled_runs",
            "Runs that the service cannot process, such as those of an earlier version.",
            registry=self.registry,
        )
        self.dollars = Gauge(
            "moedisco_metered_dollars", "Dollars metered so far, over all runs.", registry=self.registry
        )
