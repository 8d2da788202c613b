"""Browser sessions and the one-time codes that start them; only their SHA-256 is stored.

A session acts for one token and ends with it, because both are looked up together. Sessions and codes are random
256-bit values. They are looked up by their hash, so that response times do not help to guess them.
"""

from __future__ import annotations

import secrets

from sqlalchemy import ColumnElement, and_, delete, or_, select, update
from sqlalchemy.orm import Session

from service.database import tokens
from service.database.access_tables import BrowserSession, SignInCode, Token
from service.database.ids import new_id

CODE_SECONDS = 600.0
"""Lifetime of a sign-in code, in seconds: long enough to copy a link, too short to use a code that was found in a
log."""
MOST_OF_A_TOKEN = 100
"""Maximum number of sessions of one token; starting another one ends the oldest."""


def create(session: Session, token: Token, *, longest: float, now: float) -> tuple[str, BrowserSession]:
    """Start a session of a token that lasts at most `longest` seconds.

    Returns:
        Secret of the session, which is not stored, and its row.
    """
    plain = f"mds_{secrets.token_urlsafe(32)}"
    ends = now + longest if token.expires is None else min(token.expires, now + longest)
    row = BrowserSession(id=new_id(), hash=tokens.digest(plain), token_id=token.id, created=now, used=now, ends=ends)
    query = select(BrowserSession.id).where(BrowserSession.token_id == token.id).order_by(BrowserSession.id.desc())
    surplus = list(session.scalars(query.offset(MOST_OF_A_TOKEN - 1)))
    session.execute(delete(BrowserSession).where(BrowserSession.id.in_(surplus)))
    session.add(row)
    session.flush()
    return plain, row


def find(session: Session, plain: str, *, idle: float, now: float) -> tuple[BrowserSession, Token] | None:
    """Find a valid session and its token by the session's secret. A session ends after `idle` seconds without use."""
    found = _valid(session, BrowserSession.hash == tokens.digest(plain), idle, now)
    return found if found is not None and tokens.matches(plain, found[0].hash) else None


def get(session: Session, session_id: str, *, idle: float, now: float) -> tuple[BrowserSession, Token] | None:
    """Find a valid session and its token by the session's id; arguments as in `find`."""
    return _valid(session, BrowserSession.id == session_id, idle, now)


def touch(session: Session, row: BrowserSession, now: float) -> None:
    """Record the use of a session, which extends it."""
    session.execute(update(BrowserSession).where(BrowserSession.id == row.id).values(used=now))


def end(session: Session, plain: str) -> None:
    """End the session with this secret, if it exists."""
    session.execute(delete(BrowserSession).where(BrowserSession.hash == tokens.digest(plain)))


def end_all(session: Session, token_id: str) -> None:
    """End all sessions of a token and delete its sign-in codes."""
    session.execute(delete(BrowserSession).where(BrowserSession.token_id == token_id))
    session.execute(delete(SignInCode).where(SignInCode.token_id == token_id))


def of_token(session: Session, token_id: str, *, idle: float, now: float) -> list[BrowserSession]:
    """The valid sessions of a token, newest first; arguments as in `find`."""
    query = select(BrowserSession).where(BrowserSession.token_id == token_id, _alive(idle, now))
    return list(session.scalars(query.order_by(BrowserSession.id.desc())))


def create_code(session: Session, token_id: str, now: float) -> str:
    """Create a single-use code that starts a browser session of a token; it expires after `CODE_SECONDS`."""
    plain = f"mdc_{secrets.token_urlsafe(32)}"
    session.add(SignInCode(hash=tokens.digest(plain), token_id=token_id, ends=now + CODE_SECONDS))
    session.flush()
    return plain


def redeem(session: Session, plain: str, now: float) -> Token | None:
    """Use up a code.

    Returns:
        Token of the code; None if the code is unknown, used or expired, or if its token is not valid.
    """
    # One statement, so that only one of two concurrent requests succeeds.
    claim = (
        delete(SignInCode)
        .where(SignInCode.hash == tokens.digest(plain), SignInCode.ends > now)
        .returning(SignInCode.token_id)
    )
    token_id = session.scalar(claim)
    token = None if token_id is None else tokens.get(session, token_id)
    return token if token is not None and tokens.is_valid(token, now) else None


def purge(session: Session, *, idle: float, now: float) -> None:
    """Delete ended sessions and expired codes; arguments as in `find`."""
    session.execute(delete(BrowserSession).where(or_(BrowserSession.ends <= now, BrowserSession.used <= now - idle)))
    session.execute(delete(SignInCode).where(SignInCode.ends <= now))


def _valid(
    session: Session, which: ColumnElement[bool], idle: float, now: float
) -> tuple[BrowserSession, Token] | None:
    query = select(BrowserSession, Token).join(Token, Token.id == BrowserSession.token_id)
    found = session.execute(query.where(which, _alive(idle, now))).one_or_none()
    return (found[0], found[1]) if found is not None and tokens.is_valid(found[1], now) else None


def _alive(idle: float, now: float) -> ColumnElement[bool]:
    return and_(BrowserSession.ends > now, BrowserSession.used > now - idle)
