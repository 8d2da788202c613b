"""The dated price book."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.database.tables import Price


def put(session: Session, *, resource: str, dollars_per_hour: float, since: float) -> Price:
    """Set what a worker-hour of a pool costs from a moment on; an entry of the same moment is replaced."""
    price = session.merge(Price(resource=resource, since=since, dollars_per_hour=dollars_per_hour))
    session.flush()
    return price


def book(session: Session) -> list[Price]:
    """All entries, oldest first."""
    return list(session.scalars(select(Price).order_by(Price.since, Price.resource)))


def price_at(session: Session, resource: str, time: float) -> float | None:
    """Dollars per worker-hour at a moment; None: the book does not say."""
    return session.scalar(
        select(Price.dollars_per_hour).where(Price.resource == resource, Price.since <= time)
        .order_by(Price.since.desc()).limit(1))
