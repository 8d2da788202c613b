"""What is shown of runs besides themselves."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.database.tables import Run, Unit


def units(session: Session, run_id: str) -> list[Unit]:
    """A run's units, in the order in which they started."""
    return list(session.scalars(select(Unit).where(Unit.run_id == run_id).order_by(Unit.started, Unit.unit)))


def metered_dollars(session: Session) -> float:
    """What all runs that are kept have cost so far."""
    return session.scalar(select(func.sum(Run.dollars))) or 0.0
