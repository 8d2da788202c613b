"""Cookie of a browser session.

The cookie contains a random secret; the database stores its hash. Signing out, revoking the token, or expiry ends a
session, and all copies of its cookie become invalid. Over HTTPS the cookie has the prefix `__Host-`, so that no
subdomain can set it.

Remaining risk: browsers send a cookie to every port of its host. Another service on the same host (over plain HTTP also
anyone on the network path) can read the cookie and act as the user until the session ends; without HTTPS it can also
plant a session of its own. A session can therefore do less than its token: it cannot create tokens or sign-in codes,
nor change policies, so that a stolen session gives no access after it has ended. Runs that it submitted stay. If other
services run on the same machine, give this one its own host name with HTTPS.
"""

from __future__ import annotations

from fastapi import Request, Response

from service.settings import Settings

COOKIE = "moedisco_session"
"""Name of the session cookie over plain HTTP."""


def session_of(request: Request, settings: Settings) -> str | None:
    """The session's secret from a request's cookie; None if there is no cookie."""
    return request.cookies.get(_name(request, settings)) or None


def set_session(request: Request, response: Response, settings: Settings, plain: str, seconds: float) -> None:
    """Set the session cookie to the secret `plain`; the browser deletes it after `seconds`."""
    response.set_cookie(
        _name(request, settings),
        plain,
        max_age=max(1, int(seconds)),
        path="/",
        httponly=True,
        samesite="strict",
        secure=_is_secure(request, settings),
    )


def clear_session(request: Request, response: Response, settings: Settings) -> None:
    response.delete_cookie(
        _name(request, settings), path="/", httponly=True, samesite="strict", secure=_is_secure(request, settings)
    )


def _name(request: Request, settings: Settings) -> str:
    return f"__Host-{COOKIE}" if _is_secure(request, settings) else COOKIE


def _is_secure(request: Request, settings: Settings) -> bool:
    """Whether browsers reach the service over HTTPS, according to its public URL or the proxy in front of it."""
    return request.url.scheme == "https" or settings.url.startswith("https:")
