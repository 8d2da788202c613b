"""Sign-in, sessions and tokens."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from service.api.bodies import StrictRoute
from service.api.context import InContext, ServiceContext
from service.api.openapi import problems
from service.api.parameters import Cursor, Limit, ThingId
from service.api.security import (
    SCOPES,
    SIGNED_IN,
    Caller,
    Reader,
    check_same_origin,
    client_address,
    require_token,
    valid_token,
)
from service.api.sessions import clear_session, session_of, set_session
from service.api.submission import note
from service.database import access_tables, audit, sessions, tokens
from service.domain.access import check_token
from service.errors import Conflict, Forbidden, Unauthorised
from service.schemas import (
    Identity,
    NewSignInCode,
    NewToken,
    SessionInfo,
    SessionPage,
    SessionRequest,
    TokenInfo,
    TokenPage,
    TokenRequest,
)

router = APIRouter(prefix="/v1", tags=["access"], route_class=StrictRoute, dependencies=SIGNED_IN)
sign_ins = APIRouter(prefix="/v1/session", tags=["access"], route_class=StrictRoute)

_DAY = 24 * 3600.0


@sign_ins.post("", status_code=204, responses=problems(body=True))
def sign_in(body: SessionRequest, request: Request, response: Response, context: InContext) -> None:
    """Start a browser session with a token or a sign-in code.

    Its cookie is hidden from scripts and unusable by other sites.
    """
    if "sec-fetch-site" in request.headers or "origin" in request.headers:
        check_same_origin(request, context.settings)
    address = client_address(request)
    context.limits.take(f"address {address}")
    token = _proven(body, context)
    if token is None:
        context.sign_in_limits.take(f"address {address}")
        raise Unauthorised(
            "the token is unknown, expired or revoked"
            if body.token is not None
            else "the sign-in code is unknown, used or expired; `moedisco sign-in` makes another"
        )
    now, before = context.now(), session_of(request, context.settings)
    with context.database.write() as session:
        if before is not None:  # a browser has one session, so the previous one ends
            sessions.end(session, before)
        plain, row = sessions.create(session, token, longest=3600 * context.settings.session_max_hours, now=now)
        audit.note(
            session,
            owner=token.owner,
            token_id=token.id,
            action="session.create",
            target=row.id,
            address=address,
            now=now,
            detail={"by": "token" if body.token is not None else "code"},
        )
    set_session(request, response, context.settings, plain, row.ends - now)


@sign_ins.delete("", status_code=204, responses=problems())
def sign_out(request: Request, response: Response, context: InContext) -> None:
    """End a browser session, so that no copy of its cookie is valid any more; the token stays valid."""
    plain = session_of(request, context.settings)
    if plain is not None:
        check_same_origin(request, context.settings)
        with context.database.write() as session:
            sessions.end(session, plain)
    clear_session(request, response, context.settings)


@router.get("/sessions", responses=problems())
def list_sessions(caller: Reader, context: InContext) -> SessionPage:
    """List the browser sessions of the caller's token."""
    with context.database.read() as session:
        found = sessions.of_token(
            session, caller.token_id, idle=context.settings.session_idle_seconds, now=context.now()
        )
    return SessionPage(
        items=[
            SessionInfo(
                id=row.id, created=row.created, used=row.used, ends=row.ends, current=row.id == caller.session_id
            )
            for row in found
        ]
    )


@router.delete("/sessions", status_code=204, responses=problems())
def end_sessions(caller: Reader, context: InContext) -> None:
    """End all browser sessions of the caller's token."""
    now = context.now()
    with context.database.write() as session:
        sessions.end_all(session, caller.token_id)
        note(session, caller, "session.end_all", caller.token_id, now=now, detail={})


@router.post("/sign-in-codes", status_code=201, responses=problems())
def create_sign_in_code(caller: Reader, context: InContext) -> NewSignInCode:
    """Create a code that signs in one browser with the caller's token.

    The code is valid for ten minutes. A browser session cannot create one.
    """
    require_token(caller)
    now = context.now()
    with context.database.write() as session:
        code = sessions.create_code(session, caller.token_id, now)
    return NewSignInCode(code=code, expires=now + sessions.CODE_SECONDS)


@router.get("/identity", responses=problems())
def get_identity(caller: Reader) -> Identity:
    """Describe the caller."""
    return Identity(
        owner=caller.owner,
        scopes=[scope for scope in SCOPES if scope in caller.scopes],
        version=version("moedisco-ray"),
        dashboard_url="/ray/" if caller.admin else None,
    )


@router.get("/tokens", responses=problems())
def list_tokens(caller: Reader, context: InContext, cursor: Cursor = None, limit: Limit = 50) -> TokenPage:
    """List the caller's tokens without their secrets, oldest first; for an administrator, all tokens."""
    with context.database.read() as session:
        owner = None if caller.admin else caller.owner
        rows, following = tokens.page(session, owner, cursor=cursor, limit=limit)
        return TokenPage(items=[TokenInfo.of(row) for row in rows], next_cursor=following)


@router.post("/tokens", status_code=201, responses=problems(body=True))
def create_token(body: TokenRequest, caller: Reader, context: InContext) -> NewToken:
    """Create a token, which is shown only once; not allowed in a browser session.

    Its scopes are at most those of the caller's token.
    """
    require_token(caller)
    now = context.now()
    expires = None if body.expires_in_days is None else now + body.expires_in_days * _DAY
    scopes = [scope for scope in SCOPES if scope in body.scopes]
    owner = body.owner or caller.owner
    if not caller.admin and (owner != caller.owner or expires is None):
        raise Forbidden("only an administrator may create a token for another owner, or one that never expires")
    check_token(caller.person, caller.scopes, owner, scopes)
    with context.database.write() as session:
        plain, row = tokens.create(session, name=body.name, owner=owner, scopes=scopes, expires=expires, now=now)
        _note(session, caller, "token.create", row, now)
    return _new_token(row, plain)


@router.post("/tokens/{token_id}/rotate", responses=problems(404, 409))
def rotate_token(token_id: ThingId, caller: Reader, context: InContext) -> NewToken:
    """Replace the secret of a valid token by a new one, which is shown only once; not allowed in a browser session.

    The earlier secret and its sessions end at once. The token gets the time until its end that it had at first.
    """
    require_token(caller)
    now = context.now()
    with context.database.write() as session:
        row = _token(session, caller, token_id)
        if row.expires is None and not caller.admin:
            raise Forbidden("only an administrator may rotate a token that never expires; create another one")
        if not tokens.is_valid(row, now):
            raise Conflict("the token has expired or was revoked; create another one")
        plain = tokens.rotate(session, row, now)
        sessions.end_all(session, row.id)
        _note(session, caller, "token.rotate", row, now)
    return _new_token(row, plain)


@router.delete("/tokens/{token_id}", status_code=204, responses=problems(404))
def revoke_token(token_id: ThingId, caller: Reader, context: InContext) -> None:
    """Revoke a token and end its sessions."""
    now = context.now()
    with context.database.write() as session:
        row = _token(session, caller, token_id)
        tokens.revoke(session, row, now)
        sessions.end_all(session, row.id)
        _note(session, caller, "token.revoke", row, now)


def _token(session: Session, caller: Caller, token_id: str) -> access_tables.Token:
    """A token that the caller may rotate or revoke."""
    row = tokens.get(session, token_id)
    owner, scopes = (None, []) if row is None else (row.owner, row.scopes)
    check_token(caller.person, caller.scopes, owner, scopes)
    assert row is not None  # noqa: S101 - an absent token has no owner
    return row


def _note(session: Session, caller: Caller, action: str, row: access_tables.Token, now: float) -> None:
    detail = {"name": row.name, "owner": row.owner, "scopes": row.scopes}
    note(session, caller, action, row.id, now=now, detail=detail)


def _new_token(row: access_tables.Token, plain: str) -> NewToken:
    return NewToken.model_validate({**TokenInfo.of(row).model_dump(), "token": plain})


def _proven(body: SessionRequest, context: ServiceContext) -> access_tables.Token | None:
    if body.token is not None:
        return valid_token(body.token, context)
    with context.database.write() as session:
        return sessions.redeem(session, body.code or "", context.now())
