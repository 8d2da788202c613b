"""What surrounds every request: its id, its line in the log, its figures, and the headers of its answer."""

from __future__ import annotations

import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.responses import SECURITY_HEADERS
from service.observability import PrometheusMetrics, bound, logger

REQUEST_ID = "X-Request-ID"
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CLIENT_LEFT = 499
"""Status in logs and figures of a request whose client left before it was answered; nginx's number for it."""
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})


class Envelope:
    """The outermost part of the application.

    Args:
        app: What comes next.
        prometheus: Count the requests.
    """

    def __init__(self, app: ASGIApp, prometheus: PrometheusMetrics) -> None:
        self._app = app
        self._prometheus = prometheus
        self._log = logger("service.api")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _ACCEPTED_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        began = time.perf_counter()
        status = 0

        async def stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                # Static files have an ETag and are asked for again each time: an upgrade must not meet yesterday's scripts.
                headers.setdefault("Cache-Control", "no-cache" if scope["path"].startswith("/static/") else "no-store")
                self._prometheus.seconds.labels(_route(scope)).observe(time.perf_counter() - began)
            await send(message)

        with bound(request_id=request_id):
            try:
                await self._app(scope, receive, stamped)
                status = status or _CLIENT_LEFT
            finally:
                status = status or 500
                self._prometheus.requests.labels(_method(scope), _route(scope), str(status)).inc()
                if scope["path"] not in _QUIET:
                    milliseconds = round(1000 * (time.perf_counter() - began), 1)
                    self._log.info("request", method=scope["method"], path=scope["path"], status=status, milliseconds=milliseconds)


def _route(scope: Scope) -> str:
    """The route's template: a path of its own would make a figure per run."""
    return getattr(scope.get("route"), "path", "other")


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"
