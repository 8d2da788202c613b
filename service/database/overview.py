"""What is shown of runs besides themselves."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.database.tables import RunRow, UnitRow


def units(session: Session, run_id: str) -> list[UnitRow]:
    """A run's units, in the order in which they started."""
    return list(session.scalars(select(UnitRow).where(UnitRow.run_id == run_id).order_by(UnitRow.started, UnitRow.unit)))


def metered_dollars(session: Session) -> float:
    """What all runs that are kept have cost so far."""
    return session.scalar(select(func.sum(RunRow.dollars))) or 0.0
