"""Answers that a repeated request gets again, for a day."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.database import values
from service.database.session import lock_until_commit
from service.database.tables import IdempotencyKey

KEPT = 24 * 3600.0
"""Seconds."""


def find(session: Session, owner: str, key: str, now: float) -> IdempotencyKey | None:
    """What a key was used for; until this transaction ends, a second request with the key waits here.

    Args:
        session: Of the transaction that will `remember`.
        owner: Keys of different owners have nothing to do with each other.
        key: The request's.
        now: Seconds since the epoch.
    """
    owner, key = values.text(owner), values.text(key)
    lock_until_commit(session, "idempotency", owner, key)
    row = session.scalar(select(IdempotencyKey).where(IdempotencyKey.owner == owner, IdempotencyKey.key == key))
    return None if row is None or row.created + KEPT <= now else row


def remember(session: Session, *, owner: str, key: str, body_hash: bytes, run_id: str, now: float) -> None:
    """Keep what a key was used for; an expired use of it is forgotten.

    Args:
        session: The one that looked for it.
        owner: The request's.
        key: The request's.
        body_hash: SHA-256 of the body, which a repetition must share.
        run_id: The run it made.
        now: Seconds since the epoch.
    """
    owner, key = values.text(owner), values.text(key)
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.owner == owner, IdempotencyKey.key == key))
    session.add(IdempotencyKey(owner=owner, key=key, body_hash=body_hash, run_id=run_id, created=now))
    session.flush()


def purge(session: Session, now: float) -> None:
    """Forget what is older than a day."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created <= now - KEPT))
