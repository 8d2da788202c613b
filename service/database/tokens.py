"""Bearer tokens. A token is shown once, when it is created; only its SHA-256 is stored."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from sqlalchemy import bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from service.database import projects, values
from service.database.access_tables import Token
from service.database.ids import new_id
from service.database.paging import page_by_id

PREFIX = "mdk_"
RARELY = 60.0
"""Minimum time between two writes of a token's last use, in seconds. A write per request would be too slow."""
_BY_HASH = select(Token).where(Token.hash == bindparam("hash"))
"""Made once: every request asks this, and making it takes longer."""


def new_plain() -> str:
    """A new random token of 256 bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(plain: str) -> bytes:
    """SHA-256 of a token."""
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).digest()


def matches(plain: str, stored: bytes | None) -> bool:
    """Whether a token has the stored hash, compared in constant time."""
    return stored is not None and hmac.compare_digest(digest(plain), stored)


def create(
    session: Session, *, name: str, owner: str, scopes: Sequence[str], expires: float | None, now: float
) -> tuple[str, Token]:
    """Create a token. `expires` is its end in seconds since the epoch; with None it never expires.

    Returns:
        The token, which is not stored, and its row.
    """
    plain = new_plain()
    return plain, enter(session, plain, name=name, owner=owner, scopes=scopes, expires=expires, now=now)


def enter(
    session: Session, plain: str, *, name: str, owner: str, scopes: Sequence[str], expires: float | None, now: float
) -> Token:
    """Store the hash of an existing token, such as one from a file. The other arguments are those of `create`.

    The owner gets a default project.
    """
    projects.default_of(session, owner, now)
    token = Token(
        id=new_id(),
        hash=digest(plain),
        name=values.text(name),
        owner=values.text(owner),
        scopes=list(scopes),
        created=now,
        expires=expires,
        revoked=None,
        used=None,
    )
    session.add(token)
    session.flush()
    return token


def find(session: Session, plain: str, now: float) -> Token | None:
    """Row of a token; None if the token is unknown, expired or revoked."""
    token = known(session, plain)
    return token if token is not None and is_valid(token, now) else None


def known(session: Session, plain: str) -> Token | None:
    """Row of a token, valid or not; None if the token is unknown."""
    token = session.scalar(_BY_HASH, {"hash": digest(plain)})
    return token if token is not None and matches(plain, token.hash) else None


def is_valid(token: Token, now: float) -> bool:
    """Whether a token is neither revoked nor expired."""
    return token.revoked is None and (token.expires is None or token.expires > now)


def used_lately(token: Token, now: float) -> bool:
    """Whether the use of a token was recorded within the last minute."""
    return token.used is not None and now - token.used < RARELY


def touch(session: Session, token: Token, now: float) -> None:
    session.execute(update(Token).where(Token.id == token.id).values(used=now))


def get(session: Session, token_id: str) -> Token | None:
    return session.get(Token, values.text(token_id))


def revoke(session: Session, token: Token, now: float) -> None:
    """Revoke a token, unless it is revoked already."""
    session.execute(update(Token).where(Token.id == token.id, Token.revoked.is_(None)).values(revoked=now))


def rotate(session: Session, token: Token, now: float) -> str:
    """Give a token a new secret, and the same time until its end as it had when it was created; returns the secret."""
    plain = new_plain()
    token.hash = digest(plain)
    token.expires = None if token.expires is None else now + token.expires - token.created
    token.created = now
    session.flush()
    return plain


def page(
    session: Session, owner: str | None = None, *, cursor: str | None = None, limit: int
) -> tuple[list[Token], str | None]:
    """Tokens of an owner, or of all with None, oldest first, and the cursor of the next page; None on the last one."""
    query = select(Token) if owner is None else select(Token).where(Token.owner == values.text(owner))
    return page_by_id(session, query, Token.id, cursor=cursor, limit=limit)


def count_valid(session: Session, now: float) -> int:
    alive = or_(Token.expires.is_(None), Token.expires > now)
    return session.scalar(select(func.count()).select_from(Token).where(Token.revoked.is_(None), alive)) or 0
