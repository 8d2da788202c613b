"""Idempotency keys: a repeated request gets the same run for a day."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.database import values
from service.database.access_tables import IdempotencyKey
from service.database.session import lock_until_commit

KEPT = 24 * 3600.0
"""Time for which a key is remembered, in seconds."""


def find(session: Session, owner: str, key: str, now: float) -> IdempotencyKey | None:
    """The earlier use of an owner's key; None if there is none or it has expired.

    Locks the key until this transaction ends.
    """
    owner, key = values.text(owner), values.text(key)
    lock_until_commit(session, "idempotency", owner, key)
    row = session.scalar(select(IdempotencyKey).where(IdempotencyKey.owner == owner, IdempotencyKey.key == key))
    return None if row is None or row.created + KEPT <= now else row


def remember(session: Session, *, owner: str, key: str, body_hash: bytes, run_id: str, now: float) -> None:
    """Store the run that a request with this key created; `body_hash` is the SHA-256 that a repetition must match."""
    owner, key = values.text(owner), values.text(key)
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.owner == owner, IdempotencyKey.key == key))
    session.add(IdempotencyKey(owner=owner, key=key, body_hash=body_hash, run_id=run_id, created=now))
    session.flush()


def purge(session: Session, now: float) -> None:
    """Delete expired keys."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.created <= now - KEPT))
