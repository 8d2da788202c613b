"""The Ray dashboard's pages as another program may pass them on: reading only, path by path, with Ray's token added here.

Ray also answers GETs that change something (`/worker/cpu_profile` stops a worker to look at it), and later versions may add more:
only the paths that its pages read are passed on.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
_READABLE = re.compile("|".join((
    r"timezone|nodes|events|usage_stats_enabled|logical/actors",
    rf"(nodes|logical/actors)/{_ID}",
    r"api/(authentication_mode|cluster_status|profiling_enabled|grafana_health|prometheus_health)",
    rf"api/jobs/({_ID}(/logs)?)?",
    r"api/serve/applications/",
    rf"api/data/datasets/{_ID}",
    r"api/v0/(nodes|placement_groups|tasks|cluster_metadata|platform_events|runtime_env_redaction)",
    r"api/v0/logs(/file)?",
    r"api/v0/tasks/(summarize|timeline)",
)))
"""What the pages of Ray 2.60 read; see the routes in `ray/dashboard`."""

_QUESTION_HEADERS = ("accept", "accept-encoding", "accept-language", "if-none-match", "if-modified-since", "range", "if-range")
_AS_BROWSER = {"user-agent": "Mozilla/5.0 (moedisco)"}
"""Ray hides the values of jobs' environment variables, a run's token among them, from whatever calls itself a browser."""
_ANSWER_HEADERS = (
    "content-type", "content-length", "content-encoding", "content-range", "content-disposition", "accept-ranges", "etag",
    "last-modified", "vary")


@dataclasses.dataclass(frozen=True)
class Page:
    """An answer of the dashboard.

    Attributes:
        status: HTTP status.
        headers: Only those that describe the body.
        body: The bytes as the dashboard sent them, still encoded where a header says so.
        kind: `frame`: the HTML document that loads the scripts; `static`: files of Ray's release; `data`: anything else.
    """

    status: int
    headers: Mapping[str, str]
    body: AsyncIterator[bytes]
    kind: str


class RayPages:
    """Reads pages of one dashboard, none of any other host.

    Args:
        dashboard: Names the host and holds the token.
        transport: For tests; null: the network.
    """

    def __init__(self, dashboard: Dashboard, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._dashboard = dashboard
        self._transport = transport
        self._tls = ssl.create_default_context()

    @contextlib.asynccontextmanager
    async def open(self, method: str, path: str, query: str, headers: Mapping[str, str]) -> AsyncIterator[Page]:
        """Ask the dashboard; the body must be read inside the block.

        Args:
            method: `GET` or `HEAD`.
            path: Below the dashboard's root, decoded, without a leading slash.
            query: As it came, encoded.
            headers: Those of the request; only those that choose a representation are passed on.

        Raises:
            NotFound: The path or the query is none that the dashboard's pages read.
            RayUnavailable: The dashboard does not answer, refuses the token, or points elsewhere.
        """
        kind = kind_of(path)
        if kind is None or len(query) > LONGEST_QUERY or not query.isascii():
            raise NotFound("the Ray dashboard's pages read nothing of this name")
        url = f"{self._dashboard.url}/{quote(path, safe='/:')}{'?' + query if query else ''}"
        sent = {name: headers[name] for name in _QUESTION_HEADERS if name in headers} | _AS_BROWSER
        # A client per request: its connections belong to one event loop, and opening one to the cluster takes no time.
        async with httpx.AsyncClient(
                timeout=TIMEOUT, trust_env=False, follow_redirects=False, verify=self._tls, transport=self._transport) as client:
            client.headers.clear()
            request = client.build_request(method, url, headers={**sent, **self._dashboard.headers()})
            try:
                answer = await client.send(request, stream=True)
            except httpx.HTTPError as error:
                raise RayUnavailable(f"Ray does not answer at {self._dashboard.url} ({type(error).__name__})") from error
            async with contextlib.aclosing(answer):
                if answer.status_code in (401, 403):
                    raise RayUnavailable("Ray refuses the service's token; RAY_AUTH_TOKEN_PATH must name a file with the cluster's")
                if answer.has_redirect_location:
                    raise RayUnavailable("Ray's dashboard points to another address; name the right one with --dashboard-url")
                yield Page(
                    answer.status_code, {name: answer.headers[name] for name in _ANSWER_HEADERS if name in answer.headers},
                    answer.aiter_raw(), kind)


def kind_of(path: str) -> str | None:
    """What a path below the dashboard's root brings; see `Page.kind`. None: it is not passed on."""
    if not path.isascii() or any(part in (".", "..") for part in path.split("/")):
        return None
    if path == "":
        return "frame"
    if _STATIC.fullmatch(path):
        return "static"
    return "data" if _READABLE.fullmatch(path) else None
