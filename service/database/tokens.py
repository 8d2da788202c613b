"""Bearer tokens. A token is shown once, when it is made; what is kept is its SHA-256."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from service.database import values
from service.database.ids import new_id
from service.database.tables import Token

PREFIX = "mdk_"
RARELY = 60.0
"""Seconds between two notes of when a token was used: a write per request would be too many."""


def new_plain() -> str:
    """A new random token of 256 bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(plain: str) -> bytes:
    """What of a token is kept."""
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()


def matches(plain: str, kept: bytes | None) -> bool:
    """Whether a token is the one that was kept, in time that tells nothing."""
    return kept is not None and hmac.compare_digest(digest(plain), kept)


def create(
    session: Session, *, name: str, owner: str, scopes: Sequence[str], expires: float | None, now: float,
) -> tuple[str, Token]:
    """Make a token.

    Args:
        session: Of a transaction that writes.
        name: What it is for.
        owner: Whose runs it works with.
        scopes: `read`, `submit`, `admin`.
        expires: When it ends, in seconds since the epoch; None: never.
        now: Seconds since the epoch.

    Returns:
        The token itself, which is not kept, and its row.
    """
    plain = new_plain()
    return plain, enter(session, plain, name=name, owner=owner, scopes=scopes, expires=expires, now=now)


def enter(
    session: Session, plain: str, *, name: str, owner: str, scopes: Sequence[str], expires: float | None, now: float,
) -> Token:
    """Enter a token that was made elsewhere; arguments as in `create`."""
    token = Token(
        id=new_id(), hash=digest(plain), name=values.text(name), owner=values.text(owner), scopes=list(scopes),
        created=now, expires=expires, revoked=None, used=None)
    session.add(token)
    session.flush()
    return token


def find(session: Session, plain: str, now: float) -> Token | None:
    """The row of a token; None if it is unknown, expired or revoked."""
    token = known(session, plain)
    return token if token is not None and is_valid(token, now) else None


def known(session: Session, plain: str) -> Token | None:
    """The row of a token, valid or not; None if it is unknown."""
    token = session.scalar(select(Token).where(Token.hash == digest(plain)))
    return token if token is not None and matches(plain, token.hash) else None


def is_valid(token: Token, now: float) -> bool:
    """Whether it is neither revoked nor expired."""
    return token.revoked is None and (token.expires is None or token.expires > now)


def used_lately(token: Token, now: float) -> bool:
    """Whether its use has been noted within the last minute, so that `touch` would change little."""
    return token.used is not None and now - token.used < RARELY


def touch(session: Session, token: Token, now: float) -> None:
    """Note that a token was used."""
    session.execute(update(Token).where(Token.id == token.id).values(used=now))


def get(session: Session, token_id: str) -> Token | None:
    """A token's row by its id."""
    return session.get(Token, values.text(token_id))


def revoke(session: Session, token: Token, now: float) -> None:
    """End a token; one that was ended before stays as it is."""
    session.execute(update(Token).where(Token.id == token.id, Token.revoked.is_(None)).values(revoked=now))


def page(session: Session) -> list[Token]:
    """All tokens, oldest first."""
    return list(session.scalars(select(Token).order_by(Token.id)))


def count_valid(session: Session, now: float) -> int:
    """Tokens that would be let in."""
    alive = or_(Token.expires.is_(None), Token.expires > now)
    return session.scalar(select(func.count()).select_from(Token).where(Token.revoked.is_(None), alive)) or 0
