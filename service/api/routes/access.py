"""Signing in, and the tokens to do it with."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request, Response

from service.api.answers import token_answer
from service.api.bodies import StrictRoute
from service.api.context import InContext
from service.api.openapi import problems
from service.api.parameters import ThingId
from service.api.security import (
    SCOPES,
    SIGNED_IN,
    Admin,
    Reader,
    check_same_origin,
    client_address,
    presented_token,
    valid_token,
)
from service.api.submission import note
from service.database import tokens
from service.errors import NotFound, Unauthorised
from service.schemas import Identity, NewToken, SessionRequest, TokenPage, TokenRequest

router = APIRouter(prefix="/v1", tags=["access"], route_class=StrictRoute, dependencies=SIGNED_IN)
sessions = APIRouter(prefix="/v1/session", tags=["access"], route_class=StrictRoute)

_DAY = 24 * 3600.0


@sessions.post("", status_code=204, responses=problems(body=True))
def sign_in(body: SessionRequest, request: Request, response: Response, context: InContext) -> None:
    """Turn a token into a browser's session: a cookie that no script can read and no other site can use."""
    if "sec-fetch-site" in request.headers or "origin" in request.headers:
        check_same_origin(request, context.settings)
    context.limits.take(f"address {client_address(request)}")
    token = valid_token(body.token, context)
    if token is None:
        raise Unauthorised("the token is unknown, expired or revoked")
    seconds = int(context.settings.session_hours * 3600)
    if token.expires is not None:
        seconds = max(1, min(seconds, int(token.expires - context.now())))
    response.set_cookie(
        context.settings.session_cookie, body.token, max_age=seconds, httponly=True, samesite="strict",
        secure=request.url.scheme == "https" or context.settings.url.startswith("https:"))


@sessions.delete("", status_code=204, responses=problems())
def sign_out(request: Request, response: Response, context: InContext) -> None:
    """End a browser's session; the token stays valid."""
    if presented_token(request, context.settings) is not None:
        check_same_origin(request, context.settings)
    response.delete_cookie(context.settings.session_cookie, httponly=True, samesite="strict")


@router.get("/identity", responses=problems())
def get_identity(caller: Reader) -> Identity:
    """Who the caller is."""
    return Identity(
        owner=caller.owner, scopes=[scope for scope in SCOPES if scope in caller.scopes], version=version("moedisco-ray"),
        dashboard_url="/ray/" if caller.admin else None)


@router.get("/tokens", responses=problems())
def list_tokens(caller: Admin, context: InContext) -> TokenPage:
    """All tokens, oldest first; none is shown itself."""
    del caller
    with context.database.read() as session:
        return TokenPage(items=[token_answer(row) for row in tokens.page(session)])


@router.post("/tokens", status_code=201, responses=problems(body=True))
def create_token(body: TokenRequest, caller: Admin, context: InContext) -> NewToken:
    """Make a token. It is shown this once."""
    now = context.now()
    expires = None if body.expires_in_days is None else now + body.expires_in_days * _DAY
    scopes = [scope for scope in SCOPES if scope in body.scopes]
    with context.database.write() as session:
        plain, row = tokens.create(session, name=body.name, owner=body.owner, scopes=scopes, expires=expires, now=now)
        note(session, caller, "token.create", row.id, now, {"name": body.name, "owner": body.owner, "scopes": scopes})
    return NewToken.model_validate({**token_answer(row).model_dump(), "token": plain})


@router.delete("/tokens/{token_id}", status_code=204, responses=problems(404))
def revoke_token(token_id: ThingId, caller: Admin, context: InContext) -> None:
    """End a token at once."""
    now = context.now()
    with context.database.write() as session:
        row = tokens.get(session, token_id)
        if row is None:
            raise NotFound("there is no such token")
        tokens.revoke(session, row, now)
        note(session, caller, "token.revoke", token_id, now, {"name": row.name, "owner": row.owner})
