"""Figures of the queue and of messages, for the metrics of the service."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.database.tables import RunRow
from service.domain.states import RunState

GIVE_UP_SECONDS = 24 * 3600.0
"""Time from the end of a run to the last attempt to post its message, in seconds."""


def queue_age(session: Session, now: float) -> float:
    """Seconds since the first of the queued runs was queued; 0 if no run waits."""
    first = session.scalar(select(func.min(RunRow.queued)).where(RunRow.state == RunState.QUEUED.value))
    return 0.0 if first is None else max(0.0, now - first)


def waiting_messages(session: Session, since: float) -> int:
    """Number of runs that ended at or after a time and whose end was not posted yet."""
    waiting = select(func.count()).select_from(RunRow).where(RunRow.ended >= since, RunRow.end_posted.is_(None))
    return session.scalar(waiting) or 0
