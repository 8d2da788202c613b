"""Authentication and authorisation of callers."""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import AsyncIterator, Callable
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyCookie, HTTPBearer
from sqlalchemy.orm import Session

from service.api.context import InContext, ServiceContext
from service.api.proxies import person_of
from service.api.sessions import COOKIE, session_of
from service.database import access_tables, projects, runs, sessions, tables, tokens
from service.database.session import lock_until_commit
from service.domain.access import Action, Person, check_access
from service.errors import Conflict, Forbidden, NotFound, Unauthorised
from service.schemas import Scope
from service.settings import Settings

SCOPES: tuple[Scope, ...] = ("read", "submit", "admin")
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_LONGEST_TOKEN = 256
_LISTED = 3

_bearer = HTTPBearer(auto_error=False, scheme_name="token", description="Token from `moedisco tokens create`.")
_cookie = APIKeyCookie(
    name=COOKIE,
    auto_error=False,
    scheme_name="session",
    description="Cookie from POST /v1/session. Requests with side effects must come from the service's own page.",
)


@dataclasses.dataclass(frozen=True)
class Caller:
    """An authenticated caller.

    Attributes:
        owner: Owner that the caller acts for.
        scopes: Scopes of the caller's token, with the scopes that they include.
        session_id: Id of the browser session, if the caller used one.
        in_browser: Whether a browser adds the proof of the caller by itself: a session's cookie, or a proxy's header.
    """

    owner: str
    scopes: frozenset[Scope]
    token_id: str
    address: str | None
    session_id: str | None = None
    in_browser: bool = False

    @property
    def admin(self) -> bool:
        return "admin" in self.scopes

    @property
    def person(self) -> Person:
        return Person(self.owner, self.admin)


def require(scope: Scope) -> Callable[..., Caller]:
    """A FastAPI dependency that authenticates the caller and requires a scope."""

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


async def _stream_slot(caller: Reader, context: InContext) -> AsyncIterator[None]:
    with context.stream_slots.taken(caller.token_id):
        yield


STREAM_SLOT = Depends(_stream_slot)
"""FastAPI dependency that counts a long response against the token's limit on streams until the response ends."""
SIGNED_IN = list(_SCHEMES)
"""FastAPI dependencies that document, in the OpenAPI schema, that a route needs a token or a session."""


def identify(request: Request, context: ServiceContext) -> Caller:
    """Authenticate a request by the token in its header, else by the session in its cookie, else by a proxy's header.

    Raises:
        Unauthorised: The request has no valid token or session, or the header of a proxy that is not trusted.
        Forbidden: A browser sends the request from another site.
        TooMany: The caller exceeds the rate limit.
    """
    caller, remedy = _proven(request, context, check_origin=request.method not in _SAFE)
    if caller is None:
        context.limits.take(f"address {client_address(request)}")
        raise Unauthorised(remedy)
    request.state.allowance = context.limits.take(f"token {caller.token_id}")
    return caller


def check_known(request: Request, context: ServiceContext) -> None:
    """Refuse a request without a valid token or session before its body is read; permissions are checked later.

    Raises:
        Unauthorised: The request has no valid token or session.
        TooMany: The address exceeds the rate limit.
    """
    if _proven(request, context, check_origin=False)[0] is None:
        context.limits.take(f"address {client_address(request)}")
        raise Unauthorised("a body of this size is read only with a valid token or session")


def _proven(request: Request, context: ServiceContext, *, check_origin: bool) -> tuple[Caller | None, str]:
    """The caller of a request, or what is wrong with its proof."""
    address, plain = client_address(request), bearer_token(request)
    cookie, person = session_of(request, context.settings), person_of(request, context.settings)
    if plain is not None:
        token = valid_token(plain, context)
        return None if token is None else _caller(token, address), "the token is unknown, expired or revoked"
    if cookie is None and person is None:
        return None, "send a token in the header `Authorization: Bearer TOKEN`"
    if check_origin:
        check_same_origin(request, context.settings)
    caller = None if cookie is None else _caller_of_session(cookie, context, address)
    if caller is not None or person is None:
        return caller, "the session has ended; sign in again"
    token = _token_of_proxy(person, context)
    caller = None if token is None else dataclasses.replace(_caller(token, address), in_browser=True)
    return caller, "an administrator has revoked your sign-in by the proxy"


def _token_of_proxy(person: str, context: ServiceContext) -> access_tables.Token | None:
    """Token that stands for a person's sign-in by the proxy, made at the first one; None if it was revoked.

    Its secret is known to no one, because it is derived from the service's.
    """
    plain = tokens.PREFIX + hmac.new(context.secret, f"proxy {person}".encode(), "sha256").hexdigest()
    with context.database.read() as session:
        known = tokens.known(session, plain) is not None
    if not known:
        with context.database.write() as session:
            lock_until_commit(session, "proxy", person)
            if tokens.known(session, plain) is None:
                now = context.now()
                tokens.enter(
                    session, plain, name="sign-in by proxy", owner=person, scopes=["submit"], expires=None, now=now
                )
    return valid_token(plain, context)


def valid_token(plain: str, context: ServiceContext) -> access_tables.Token | None:
    """Row of a token, or None if it is not valid; records the use of the token at most once a minute."""
    if len(plain) > _LONGEST_TOKEN:
        return None
    now = context.now()
    with context.database.read() as session:
        token = tokens.find(session, plain, now)
    if token is not None and not tokens.used_lately(token, now):
        with context.database.write() as session:
            tokens.touch(session, token, now)
    return token


def still_allowed(caller: Caller, context: ServiceContext, run_id: str) -> bool:
    """Whether a caller's token or session is still valid, and the caller may still see a run.

    Called during long responses, which count as use of the session.
    """
    try:
        with context.database.read() as session:
            run_for(session, caller, run_id)
    except NotFound:
        return False
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
    """Refuse callers in browsers: the effect of the action would outlast the session.

    Raises:
        Forbidden: The caller used a session, or a proxy's header.
    """
    if caller.in_browser:
        raise Forbidden("a browser session may not do this; send the token in the header `Authorization: Bearer TOKEN`")


def _caller(token: access_tables.Token, address: str | None) -> Caller:
    return Caller(token.owner, implied(token.scopes), token.id, address)


def _caller_of_session(plain: str, context: ServiceContext, address: str | None) -> Caller | None:
    if len(plain) > _LONGEST_TOKEN:
        return None
    now = context.now()
    with context.database.read() as session:
        found = sessions.find(session, plain, idle=context.settings.session_idle_seconds, now=now)
    if found is None:
        return None
    _note_use(found, context, now)
    return dataclasses.replace(_caller(found[1], address), session_id=found[0].id, in_browser=True)


def _note_use(
    found: tuple[access_tables.BrowserSession, access_tables.Token], context: ServiceContext, now: float
) -> None:
    if now - found[0].used >= tokens.RARELY:
        with context.database.write() as session:
            sessions.touch(session, found[0], now)
            tokens.touch(session, found[1], now)


def run_for(
    session: Session, caller: Caller, run_id: str, action: Action = "see", *, lock: bool = False
) -> tables.RunRow:
    """Load a run for something that the caller wants to do to it.

    With `lock`, the transaction must be a writing one, and the run stays locked until the transaction ends.

    Raises:
        NotFound: The run does not exist, or the caller is a stranger in its project.
        Forbidden: The caller's role in the project does not allow the action.
    """
    run = (runs.lock if lock else runs.get)(session, run_id)
    check_access(None if run is None else projects.role(session, caller.person, run.project), action, "run")
    assert run is not None  # noqa: S101 - an absent run is nobody's
    return run


def project_for(session: Session, caller: Caller, name: str, action: Action = "see") -> access_tables.Project:
    """Load a project, by its id or name, for something that the caller wants to do to it.

    Raises:
        NotFound: The project does not exist, or the caller is a stranger in it.
        Forbidden: The caller's role in the project does not allow the action.
        Conflict: Several projects have this name.
    """
    found = projects.find(session, caller.person, name)
    if len(found) > 1:
        ids = ", ".join(row.id for row, _ in found[:_LISTED])
        raise Conflict(f"{name} is the name of {len(found)} projects; choose one by its id, such as {ids}")
    check_access(found[0][1] if found else None, action, "project")
    return found[0][0]


def own_project_for(session: Session, caller: Caller, name: str, now: float) -> access_tables.Project:
    """Load a project to edit; the caller's default project is created if it does not exist. See `project_for`."""
    if name == caller.owner:
        projects.default_of(session, caller.owner, now)
    return project_for(session, caller, name, "edit")


def implied(scopes: list[str]) -> frozenset[Scope]:
    """The given scopes and all scopes that they include."""
    highest = max((i for i, scope in enumerate(SCOPES) if scope in scopes), default=-1)
    return frozenset(SCOPES[: highest + 1])


def check_same_origin(request: Request, settings: Settings) -> None:
    """Refuse a browser's request from another site.

    Raises:
        Forbidden: The request comes from another site, or its origin is unknown.
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
    """The bearer token in the Authorization header; None if there is none."""
    scheme, _, plain = request.headers.get("authorization", "").partition(" ")
    return plain.strip() if scheme.lower() == "bearer" and plain.strip() else None


def client_address(request: Request) -> str | None:
    """Address of the client, as reported by a trusted proxy."""
    return request.client.host if request.client else None


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""
