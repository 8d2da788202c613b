"""Read-only proxy of the Ray dashboard's pages, which adds Ray's token.

Only the paths that the pages read are allowed, because some GET requests have side effects (`/worker/cpu_profile`
pauses a worker) and later versions of Ray may add more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from urllib.parse import quote

import httpx

from service.errors import NotFound, RayUnavailable
from service.ray_side.dashboard import Dashboard

TIMEOUT = httpx.Timeout(30, connect=3)
LONGEST_QUERY = 4096

_ID = r"[A-Za-z0-9_.:-]{1,128}"
_STATIC = re.compile(r"(favicon\.ico|static/(css|js|media)/[A-Za-z0-9_.-]{1,128})?")
_READABLE = re.compile(
    "|".join(
        (
            r"timezone|nodes|events|usage_stats_enabled|logical/actors",
            rf"(nodes|logical/actors)/{_ID}",
            r"api/(authentication_mode|cluster_status|profiling_enabled|grafana_health|prometheus_health)",
            rf"api/jobs/({_ID}(/logs)?)?",
            r"api/serve/applications/",
            rf"api/data/datasets/{_ID}",
            r"api/v0/(nodes|placement_groups|tasks|cluster_metadata|platform_events|runtime_env_redaction)",
            r"api/v0/logs(/file)?",
            r"api/v0/tasks/(summarize|timeline)",
        )
    )
)
"""Paths that the dashboard's pages request in Ray 2.60; see the routes in `ray/dashboard`."""

_QUESTION_HEADERS = (
    "accept",
    "accept-encoding",
    "accept-language",
    "if-none-match",
    "if-modified-since",
    "range",
    "if-range",
)
_AS_BROWSER = {"user-agent": "Mozilla/5.0 (moedisco)"}
"""Header that makes Ray hide the values of jobs' environment variables, which include the run's token."""
_ANSWER_HEADERS = (
    "content-type",
    "content-length",
    "content-encoding",
    "content-range",
    "content-disposition",
    "accept-ranges",
    "etag",
    "last-modified",
    "vary",
)


@dataclasses.dataclass(frozen=True)
class Page:
    """A response of the dashboard.

    Attributes:
        headers: The response's headers about the body, such as its type and encoding.
        body: Bytes as received, still compressed if a header says so.
        kind: `frame` for the HTML document that loads the scripts, `static` for files of Ray's release, `data` for the
            rest.
    """

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]
    kind: str


@functools.cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


class RayPages:
    """Reads pages of one dashboard and of no other host.

    Args:
        dashboard: Dashboard with its URL and token.
        transport: Transport for tests; None uses the network.
    """

    def __init__(self, dashboard: Dashboard, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._dashboard = dashboard
        self._transport = transport
        self._tls = _certificates()

    @contextlib.asynccontextmanager
    async def open(self, method: str, path: str, query: str, headers: Mapping[str, str]) -> AsyncIterator[Page]:
        """Request a page; its body must be read inside the block.

        Args:
            method: `GET` or `HEAD`.
            path: Decoded path below the dashboard's root, without a leading slash.
            query: Encoded query.
            headers: Headers of the request; only content negotiation, ranges and caching are passed on.

        Raises:
            NotFound: The dashboard's pages do not request this path or query.
            RayUnavailable: The dashboard does not answer, refuses the token, or redirects.
        """
        kind = kind_of(path)
        if kind is None or len(query) > LONGEST_QUERY or not query.isascii():
            raise NotFound("the Ray dashboard's pages do not read this path")
        url = f"{self._dashboard.url}/{quote(path, safe='/:')}{'?' + query if query else ''}"
        sent = {name: headers[name] for name in _QUESTION_HEADERS if name in headers} | _AS_BROWSER
        # A client per request: its connections belong to one event loop, and opening one to the cluster is cheap.
        async with httpx.AsyncClient(
            timeout=TIMEOUT, trust_env=False, follow_redirects=False, verify=self._tls, transport=self._transport
        ) as client:
            client.headers.clear()
            request = client.build_request(method, url, headers={**sent, **self._dashboard.headers()})
            try:
                answer = await client.send(request, stream=True)
            except httpx.HTTPError as error:
                raise RayUnavailable(
                    f"Ray does not answer at {self._dashboard.url} ({type(error).__name__})"
                ) from error
            async with contextlib.aclosing(answer):
                if answer.status_code in (401, 403):
                    raise RayUnavailable(
                        "Ray refuses the service's token; RAY_AUTH_TOKEN_PATH must name a file with the cluster's"
                    )
                if answer.has_redirect_location:
                    raise RayUnavailable(
                        "Ray's dashboard redirects to another address; set the right one with --dashboard-url"
                    )
                yield Page(
                    answer.status_code,
                    {name: answer.headers[name] for name in _ANSWER_HEADERS if name in answer.headers},
                    answer.aiter_raw(),
                    kind,
                )


def kind_of(path: str) -> str | None:
    """`Page.kind` of a path below the dashboard's root; None if the path is not allowed."""
    if not path.isascii() or any(part in (".", "..") for part in path.split("/")):
        return None
    if path == "":
        return "frame"
    if _STATIC.fullmatch(path):
        return "static"
    return "data" if _READABLE.fullmatch(path) else None
