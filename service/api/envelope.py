"""Gives every request an id, a log line, metrics, and response headers."""

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
"""Status in logs and metrics if the client disconnected before the response, as in nginx."""
_QUIET = frozenset({"/healthz", "/readyz", "/metrics"})


class Envelope:
    """Outermost middleware: gives every request an id, a log line, metrics and response headers."""

    def __init__(self, app: ASGIApp, prometheus: PrometheusMetrics) -> None:
        self._app = app
        self._prometheus = prometheus
        self._log = logger("service.api")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
                if (allowance := scope["state"].get("allowance")) is not None:
                    headers.update(allowance.headers)
                # Browsers must revalidate static files, which have an ETag, so that an upgrade takes effect at once.
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
                    self._log.info(
                        "request", method=scope["method"], path=scope["path"], status=status, milliseconds=milliseconds
                    )


def _route(scope: Scope) -> str:
    """Path template of the route, such as `/runs/{run_id}`; the actual path would add a time series for every run."""
    return getattr(scope.get("route"), "path", "other")


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"
