"""Who asks, and what they may do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import AsyncIterator, Callable
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyCookie, HTTPBearer
from sqlalchemy.orm import Session

from service.api.context import InContext, ServiceContext
from service.api.sessions import session_of
from service.database import runs, sessions, tables, tokens
from service.errors import Forbidden, NotFound, Unauthorised
from service.schemas import Scope
from service.settings import Settings

SCOPES: tuple[Scope, ...] = ("read", "submit", "admin")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_LONGEST_TOKEN = 256
_REPORT = re.compile(r"/v1/runs/([^/]+)/report")

_bearer = HTTPBearer(auto_error=False, scheme_name="token", description="A token that `moedisco tokens create` made.")
_cookie = APIKeyCookie(
    name=Settings.model_fields["session_cookie"].default, auto_error=False, scheme_name="session",
    description="What POST /v1/session sets. Requests that change something must come from the service's own page.")
_driver = HTTPBearer(auto_error=False, scheme_name="driver", description="The token of one attempt of one run.")


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        owner: In whose name.
        scopes: All that the token allows, those that others imply included.
        token_id: The token's.
        address: Where the request comes from.
        session_id: The browser's session, if that is how the caller proved who they are.
    """

    owner: str
    scopes: frozenset[Scope]
    token_id: str
    address: str | None
    session_id: str | None = None

    @property
    def admin(self) -> bool:
        """Whether every owner's things are theirs to see."""
        return "admin" in self.scopes


def require(scope: Scope) -> Callable[..., Caller]:
    """A dependency that lets in whoever holds the scope."""

    def caller(request: Request, context: InContext) -> Caller:
        found = identify(request, context)
        if scope not in found.scopes:
            raise Forbidden(f"this needs a token with the scope {scope!r}; yours has {', '.join(sorted(found.scopes))}")
        return found

    return caller


_SCHEMES = (Security(_bearer), Security(_cookie))
Reader = Annotated[Caller, Depends(require("read"))]
Submitter = Annotated[Caller, Depends(require("submit"))]
Admin = Annotated[Caller, Depends(require("admin"))]


async def _stream_place(caller: Reader, context: InContext) -> AsyncIterator[None]:
    with context.places.taken(caller.token_id):
        yield


STREAM_PLACE = Depends(_stream_place)
"""A dependency that holds one of the token's streams until the answer is sent."""
SIGNED_IN = list(_SCHEMES)
"""Dependencies that document how one signs in."""
DRIVER = [Security(_driver)]
"""Dependencies that document how a driver proves itself."""


def identify(request: Request, context: ServiceContext) -> Caller:
    """Find out who asks: by the token in the header, else by the session in the cookie.

    Raises:
        Unauthorised: Neither is there, or it is not valid.
        Forbidden: A browser's session was used by another site.
        TooMany: They ask too often.
    """
    address = client_address(request)
    plain, cookie = bearer_token(request), session_of(request, context.settings)
    if plain is not None:
        token = valid_token(plain, context)
        caller = None if token is None else _caller(token, None, address)
        remedy = "the token is unknown, expired or revoked"
    elif cookie is not None:
        if request.method not in _SAFE:
            check_same_origin(request, context.settings)
        caller = _caller_of_session(cookie, context, address)
        remedy = "the session is over; sign in again"
    else:
        caller, remedy = None, "send a token in the header `Authorization: Bearer TOKEN`"
    if caller is None:
        context.limits.take(f"address {address}")
        raise Unauthorised(remedy)
    context.limits.take(f"token {caller.token_id}")
    return caller


def check_known(request: Request, context: ServiceContext) -> None:
    """Refuse a caller without a valid token or session; what they may do is checked later.

    Raises:
        Unauthorised: The credential is missing or not valid.
        TooMany: The address tried too often.
    """
    if (report := _REPORT.fullmatch(request.url.path)) is not None:
        with context.database.read() as session:
            check_driver(request, context, runs.get(session, report[1]))
        return
    address = client_address(request)
    plain, cookie = bearer_token(request), session_of(request, context.settings)
    if plain is not None:
        known = valid_token(plain, context) is not None
    else:
        known = cookie is not None and _caller_of_session(cookie, context, address) is not None
    if not known:
        context.limits.take(f"address {address}")
        raise Unauthorised("a body of this size is read only with a valid token or session")


def valid_token(plain: str, context: ServiceContext) -> tables.Token | None:
    """The row of a token that is valid now; its use is noted, once a minute."""
    if len(plain) > _LONGEST_TOKEN:
        return None
    now = context.now()
    with context.database.read() as session:
        token = tokens.find(session, plain, now)
    if token is not None and not tokens.used_lately(token, now):
        with context.database.write() as session:
            tokens.touch(session, token, now)
    return token


def still_allowed(caller: Caller, context: ServiceContext) -> bool:
    """Whether what a caller proved is still valid, for answers that take long; a session counts as used."""
    now = context.now()
    if caller.session_id is None:
        with context.database.read() as session:
            token = tokens.get(session, caller.token_id)
        return token is not None and tokens.is_valid(token, now)
    with context.database.read() as session:
        found = sessions.get(session, caller.session_id, idle=context.settings.session_idle_seconds, now=now)
    if found is not None:
        _note_use(found, context, now)
    return found is not None


def require_token(caller: Caller) -> None:
    """Refuse a browser's session what would outlive it.

    Raises:
        Forbidden: The caller has a session only.
    """
    if caller.session_id is not None:
        raise Forbidden("a browser's session may not do this; send the token in the header `Authorization: Bearer TOKEN`")


def _caller(token: tables.Token, session_id: str | None, address: str | None) -> Caller:
    return Caller(token.owner, implied(token.scopes), token.id, address, session_id)


def _caller_of_session(plain: str, context: ServiceContext, address: str | None) -> Caller | None:
    if len(plain) > _LONGEST_TOKEN:
        return None
    now = context.now()
    with context.database.read() as session:
        found = sessions.find(session, plain, idle=context.settings.session_idle_seconds, now=now)
    if found is None:
        return None
    _note_use(found, context, now)
    return _caller(found[1], found[0].id, address)


def _note_use(found: tuple[tables.BrowserSession, tables.Token], context: ServiceContext, now: float) -> None:
    """Note, once a minute, that a session and its token are used."""
    if now - found[0].used >= tokens.RARELY:
        with context.database.write() as session:
            sessions.touch(session, found[0], now)
            tokens.touch(session, found[1], now)


def check_driver(request: Request, context: ServiceContext, run: tables.RunRow | None) -> tables.RunRow:
    """Let in the driver of a run's present attempt only.

    Raises:
        Unauthorised: It is another's token, or that of an attempt that was given up.
    """
    plain = bearer_token(request)
    if plain is None or len(plain) > _LONGEST_TOKEN or run is None or not tokens.matches(plain, run.token_hash):
        context.limits.take(f"address {client_address(request)}")
        raise Unauthorised("this is not the token of the run's present attempt")
    return run


def visible_run(session: Session, caller: Caller, run_id: str, *, lock: bool = False) -> tables.RunRow:
    """A run of the caller's, or anybody's for an administrator.

    Args:
        session: Any; one that writes, to lock it.
        caller: Who asks.
        run_id: Which.
        lock: Keep others from changing it until the transaction ends.

    Raises:
        NotFound: There is none, or it is another owner's.
    """
    run = (runs.lock if lock else runs.get)(session, run_id)
    if run is None or not (caller.admin or run.owner == caller.owner):
        raise NotFound("there is no such run, or it is not yours")
    return run


def implied(scopes: list[str]) -> frozenset[Scope]:
    """The scopes with those they hold."""
    highest = max((i for i, scope in enumerate(SCOPES) if scope in scopes), default=-1)
    return frozenset(SCOPES[:highest + 1])


def check_same_origin(request: Request, settings: Settings) -> None:
    """Refuse a browser's request that another site made.

    Raises:
        Forbidden: It did, or nothing says that it did not.
    """
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site is not None:
        allowed = site in ("same-origin", "none")
    else:
        allowed = origin is not None and _host(origin) in {_host(settings.url), request.headers.get("host", "").lower()}
    if not allowed:
        raise Forbidden("a session may be used from the service's own page only; programs send the token as a header")


def bearer_token(request: Request) -> str | None:
    """What the Authorization header brings."""
    kind, _, plain = request.headers.get("authorization", "").partition(" ")
    return plain.strip() if kind.lower() == "bearer" and plain.strip() else None


def client_address(request: Request) -> str | None:
    """Where a request comes from, a trusted proxy's word included."""
    return request.client.host if request.client else None


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""
