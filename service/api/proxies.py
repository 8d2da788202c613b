"""Sign-in by a header of a trusted proxy, such as oauth2-proxy.

The address of the proxy is known to the server alone: for the application, the client's address comes from
X-Forwarded-For. So the server marks the requests that come from a trusted address, and the application refuses the
header in all others.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from fastapi import Request
from pydantic import TypeAdapter, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from service.domain.policies import Owner
from service.errors import Unauthorised
from service.settings import IPNetwork, Settings

FROM_PROXY = "moedisco.from_proxy"
"""Key of a request's scope: whether a trusted proxy has sent it."""
_OWNER: TypeAdapter[str] = TypeAdapter(Owner)


class MarkedProxies:
    """Middleware that marks the requests of trusted proxies; the outermost one, which sees their addresses.

    Args:
        app: Next application.
        trusted: Addresses of the proxies.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[IPNetwork]) -> None:
        self._app = app
        self._trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, FROM_PROXY: self._is_trusted(scope.get("client"))}
        await self._app(scope, receive, send)

    def _is_trusted(self, client: tuple[str, int] | None) -> bool:
        try:
            address = ipaddress.ip_address(client[0] if client else "")
        except ValueError:
            return False
        plain = getattr(address, "ipv4_mapped", None) or address
        return any(plain in network for network in self._trusted)


def person_of(request: Request, settings: Settings) -> str | None:
    """The person whom the proxy's header names; None if there is no such header, or it means nothing.

    Raises:
        Unauthorised: The header does not come from a trusted proxy, or names no possible owner.
    """
    header = settings.sign_in_header
    named = [] if header is None else request.headers.getlist(header)
    if not named:
        return None
    if not request.scope.get(FROM_PROXY):
        raise Unauthorised(f"the header {header} is accepted from the service's own proxy alone; leave it out")
    try:
        return _OWNER.validate_python(", ".join(named))
    except ValidationError as error:
        raise Unauthorised(
            f"the header {header} names no possible owner: 1 to 64 letters, digits and . _ @ -, first a letter or digit"
        ) from error
