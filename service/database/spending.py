"""Metered dollars per owner and calendar month; they outlive the runs that they were spent on."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.database.tables import Spending
from service.domain.months import month_of


def add(session: Session, owner: str, dollars: float, now: float) -> None:
    """Add dollars to an owner's month.

    Args:
        session: Of a transaction that writes.
        owner: Whose runs were metered.
        dollars: At least 0.
        now: Seconds since the epoch; names the month.
    """
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    row = insert(Spending).values(owner=owner, month=month_of(now), dollars=dollars)
    session.execute(row.on_conflict_do_update(
        index_elements=[Spending.owner, Spending.month], set_={"dollars": Spending.dollars + row.excluded.dollars}))


def of_month(session: Session, now: float) -> dict[str, float]:
    """Dollars of this month per owner."""
    return dict(session.execute(select(Spending.owner, Spending.dollars).where(Spending.month == month_of(now))).all())


def of_owner(session: Session, owner: str, now: float) -> float:
    """Dollars of one owner in this month."""
    return session.scalar(select(Spending.dollars).where(Spending.owner == owner, Spending.month == month_of(now))) or 0.0
