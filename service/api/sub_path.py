"""Serves the application below the path of its public URL, such as `/moedisco` of `https://HOST/moedisco`."""

from __future__ import annotations

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class SubPath:
    """Middleware that removes the path of the public URL from the paths of requests.

    Some proxies remove that path themselves; a request without it is passed on as it is. The page, the reference and
    the Ray dashboard use relative URLs only.

    Args:
        app: Next application.
        path: Path of the public URL, without a trailing slash.
    """

    def __init__(self, app: ASGIApp, path: str) -> None:
        self._app = app
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == self._path:
            # Relative URLs of the page need the slash.
            await RedirectResponse(f"{self._path}/")(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"].startswith(f"{self._path}/"):
            cut = len(self._path)
            scope = {**scope, "path": scope["path"][cut:], "raw_path": scope.get("raw_path", b"")[cut:]}
        await self._app(scope, receive, send)
