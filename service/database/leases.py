"""Leases of work that one process at a time may do, measured with the database's clock."""

from __future__ import annotations

import dataclasses

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from service.database.session import lock_until_commit
from service.database.supervision_tables import LastDone, LeaseRow

LEASE = "background"
"""Lease of the background work."""
ROUND, BACKUP = "round", "backup"
"""Tasks whose last completion is stored: a round of the reconciler, and a backup."""
_CLOCKS = {
    # Not now(), the time at which the transaction began: it may have waited for a lock since.
    "postgresql": "SELECT CAST(extract(epoch FROM clock_timestamp()) AS double precision)",
    "sqlite": "SELECT (julianday('now') - 2440587.5) * 86400.0",
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A lease that a process holds.

    Attributes:
        epoch: Number of times the lease was taken, this one included.
    """

    name: str
    holder: str
    epoch: int


def clock(session: Session) -> float:
    """Time of the database's clock, in seconds since the epoch."""
    return float(session.execute(text(_CLOCKS[session.get_bind().dialect.name])).scalar_one())


def take(session: Session, name: str, holder: str, seconds: float, *, starts: bool) -> Claim | None:
    """Take a lease; None if another process holds it.

    Args:
        session: Writing transaction.
        name: Name of the lease.
        holder: Name of the replica.
        seconds: Term of the lease.
        starts: Whether the process has just started: the replica's earlier process has ended then, so that its lease
            is taken at once.
    """
    lock_until_commit(session, "lease", name)
    row, now = _locked(session, name), clock(session)
    if row is None:
        row = LeaseRow(name=name, holder=holder, epoch=0, ends=0.0)
        session.add(row)
    if row.ends > now and not (starts and row.holder == holder):
        return None
    row.holder, row.epoch, row.ends = holder, row.epoch + 1, now + seconds
    return Claim(name, holder, row.epoch)


def renew(session: Session, claim: Claim, seconds: float) -> bool:
    """Let a held lease end later; returns false if another process has taken it.

    A lease that has ended is renewed if no other process has taken it.
    """
    row = _locked(session, claim.name)
    if row is None or not _is_of(row, claim):
        return False
    row.ends = clock(session) + seconds
    return True


def release(session: Session, claim: Claim) -> None:
    """End a held lease, so that another replica may take it at once."""
    row = _locked(session, claim.name)
    if row is not None and _is_of(row, claim):
        row.ends = 0.0
        row.epoch += 1


def holds(session: Session, claim: Claim) -> bool:
    """Whether no other process has taken a lease; until this transaction ends, none can."""
    row = session.scalar(select(LeaseRow).where(LeaseRow.name == claim.name).with_for_update(read=True))
    return row is not None and _is_of(row, claim)


def holder(session: Session, name: str) -> str | None:
    """Name of the replica that holds a lease now; None if no replica does."""
    row = session.get(LeaseRow, name)
    return row.holder if row is not None and row.ends > clock(session) else None


def done(session: Session, task: str) -> None:
    """Store that a task was completed now."""
    session.merge(LastDone(task=task, time=clock(session)))


def ages(session: Session) -> dict[str, float]:
    """Seconds since each task was completed; tasks that never were are missing."""
    now = clock(session)
    return {row.task: max(0.0, now - row.time) for row in session.scalars(select(LastDone))}


def _locked(session: Session, name: str) -> LeaseRow | None:
    return session.get(LeaseRow, name, with_for_update=True, populate_existing=True)


def _is_of(row: LeaseRow, claim: Claim) -> bool:
    return (row.holder, row.epoch) == (claim.holder, claim.epoch)
