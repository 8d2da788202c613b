"""Pages for browsers: the service's own, and the Ray dashboard under `/ray/` for administrators.

The dashboard's scripts run on the origin of the service, to which the administrator's session belongs. They cannot use
it, because:

* Only GET and HEAD, and only paths that the dashboard's pages read, are forwarded; no job can be submitted or stopped.
* A content security policy restricts the dashboard's HTML page to `/ray/`: no requests to the service's API, no forms,
  frames or workers, and (by the sandbox) no new windows, to which the policy would not apply.
* Everything else from Ray, such as a log of a run, is sandboxed and cannot run scripts when opened as a page.
* Cookies and tokens are not forwarded in either direction.

Remaining risk: scripts of the dashboard can read all that it shows, send it elsewhere by navigating away, and set
cookies and local storage of the service's origin. The service's page stores no secret that scripts can read.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, RedirectResponse

from service.api.context import InContext
from service.api.responses import SECURITY_HEADERS, ClosedStream
from service.api.security import Admin
from service.settings import Settings
from service.web import PAGE, REFERENCE

PREFIX = "/ray/"
_HOST = re.compile(r"[A-Za-z0-9.-]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?")
_STATIC_SECONDS = 3600
_DATA_POLICY = "default-src 'none'; sandbox"

router = APIRouter(include_in_schema=False)


@router.get("/", response_class=FileResponse)
def page() -> FileResponse:
    """The page of the service, which loads its data from the API with the session's cookie."""
    return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers={"Cache-Control": "no-cache"})


@router.get("/reference", response_class=FileResponse)
def reference() -> FileResponse:
    """The reference of the REST API."""
    # The style sheet of Swagger UI embeds its icons.
    policy = f"{SECURITY_HEADERS['Content-Security-Policy']}; img-src 'self' data:"
    return FileResponse(
        REFERENCE,
        media_type="text/html; charset=utf-8",
        headers={"Cache-Control": "no-cache", "Content-Security-Policy": policy},
    )


@router.api_route(PREFIX[:-1], methods=["GET", "HEAD"])
def ray_root() -> RedirectResponse:
    """Redirect to the path at which the dashboard's relative URLs work."""
    return RedirectResponse(PREFIX[1:])  # relative, because a proxy may serve this below a path of its own


@router.api_route(PREFIX + "{path:path}", methods=["GET", "HEAD"])
async def ray_page(path: str, request: Request, caller: Admin, context: InContext) -> Response:
    """A page, static file or API response of the Ray dashboard."""
    del caller
    async with AsyncExitStack() as stack:
        page = await stack.enter_async_context(
            context.ray_pages.open(
                request.method, path, request.scope["query_string"].decode("latin-1"), request.headers
            )
        )
        headers = dict(page.headers)
        document = page.kind == "frame"
        headers["Content-Security-Policy"] = _document_policy(request, context.settings) if document else _DATA_POLICY
        if page.kind == "static" and page.status == 200:
            headers["Cache-Control"] = f"private, max-age={_STATIC_SECONDS}"
        rest = stack.pop_all()

    async def body() -> AsyncIterator[bytes]:
        async with rest:
            yield b""
            async for block in page.body:
                yield block

    blocks = body()
    await anext(blocks)  # starts `body`: otherwise closing it would not close the dashboard's response
    return ClosedStream(blocks, page.status, headers)


def _document_policy(request: Request, settings: Settings) -> str:
    """Content security policy of the dashboard's HTML page.

    It names full URLs, because a policy cannot name a path alone.
    """
    # Behind a proxy that changes the host header, the browser's address is the public URL.
    host = request.headers.get("host", "")
    direct = [f"{request.url.scheme}://{host}{path}" for path in (settings.path, "")] if _HOST.fullmatch(host) else []
    bases = [quote(settings.url, safe=":/[]%"), *direct]
    places = " ".join(f"{base}{PREFIX}" for base in dict.fromkeys(bases))
    return (
        f"default-src 'none'; script-src {places}; style-src {places} 'unsafe-inline'; img-src {places} data:; "
        f"font-src {places} data:; connect-src {places}; worker-src 'none'; frame-src 'none'; object-src 'none'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts allow-same-origin "
        "allow-downloads"
    )
