"""The cookie of a browser's session.

The cookie holds a random id that means nothing outside of this service; the database keeps its hash. Signing out, revoking the
token, and time end a session, and a copy of the cookie with it. Over HTTPS the cookie has the prefix `__Host-`: browsers take it
from this host only, and no subdomain can plant one.

What remains: browsers send a cookie to every port of its host. Another service on the same host (over plain HTTP also anyone on
the way) can read the cookie and act as its user until the session ends; without HTTPS it can also plant a session of its own.
A session is therefore worth less than its token: it cannot make tokens, sign-in codes or webhooks, nor change policies, so a stolen
one keeps no access after it has ended. Runs that it submitted stay.
Give the service a host name of its own, with HTTPS, where others serve on the same machine.
"""

from __future__ import annotations

from fastapi import Request, Response

from service.settings import Settings


def session_of(request: Request, settings: Settings) -> str | None:
    """What a browser's cookie says; None: it has none."""
    return request.cookies.get(_name(request, settings)) or None


def set_session(request: Request, response: Response, settings: Settings, plain: str, seconds: float) -> None:
    """Have the browser keep a session.

    Args:
        request: The request to sign in.
        response: Its answer.
        settings: What the operator set.
        plain: The session's secret.
        seconds: Time until the session ends at the latest.
    """
    response.set_cookie(
        _name(request, settings), plain, max_age=max(1, int(seconds)), path="/", httponly=True, samesite="strict",
        secure=_is_secure(request, settings))


def clear_session(request: Request, response: Response, settings: Settings) -> None:
    """Have the browser forget its session."""
    response.delete_cookie(
        _name(request, settings), path="/", httponly=True, samesite="strict", secure=_is_secure(request, settings))


def _name(request: Request, settings: Settings) -> str:
    return f"__Host-{settings.session_cookie}" if _is_secure(request, settings) else settings.session_cookie


def _is_secure(request: Request, settings: Settings) -> bool:
    """Whether browsers reach the service over HTTPS: so says its public URL, or the proxy in front of it."""
    return request.url.scheme == "https" or settings.url.startswith("https:")
