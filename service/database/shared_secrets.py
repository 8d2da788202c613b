"""Secrets that all processes of the service share."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy.orm import Session

from service.database.session import lock_until_commit
from service.database.supervision_tables import ServiceSecret


def kept(session: Session, name: str, make: Callable[[], bytes], now: float) -> bytes:
    """The secret with a name; makes and stores it if there is none.

    If several processes make it at the same time, all of them get the same secret.
    """
    lock_until_commit(session, "secret", name)
    row = session.get(ServiceSecret, name)
    if row is None:
        row = ServiceSecret(name=name, value=make(), created=now)
        session.add(row)
    return row.value
