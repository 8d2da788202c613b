"""What owners use, against their policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.database import policies, runs, spending
from service.database.session import lock_until_commit
from service.database.tables import RunRow
from service.domain.policies import Policies
from service.domain.quotas import Use
from service.domain.states import ACTIVE, RunState


@dataclasses.dataclass(frozen=True)
class Quotas:
    """Policies and use of every owner at one moment.

    Attributes:
        policies: Of every owner.
        uses: By owner; one without runs is absent.
    """

    policies: Policies
    uses: Mapping[str, Use]

    def use(self, owner: str) -> Use:
        """What an owner uses."""
        return self.uses.get(owner, Use())


def load(session: Session, now: float) -> Quotas:
    """Of every owner."""
    queued, active = runs.owner_counts(session, [RunState.QUEUED]), runs.owner_counts(session, ACTIVE)
    dollars, size = spending.of_month(session, now), runs.owner_bytes(session)
    uses = {
        owner: Use(queued.get(owner, 0), active.get(owner, 0), dollars.get(owner, 0.0), size.get(owner, 0))
        for owner in {*queued, *active, *dollars, *size}}
    return Quotas(policies.load(session), uses)


def use_to_change(session: Session, owner: str, now: float) -> Use:
    """What one owner uses, which no other transaction that asks for it can change before this one ends."""
    lock_until_commit(session, "quota", owner)
    return use_of(session, owner, now)


def use_of(session: Session, owner: str, now: float) -> Use:
    """What one owner uses."""
    unfinished = RunRow.state.in_([RunState.QUEUED, *ACTIVE])
    states = dict(session.execute(
        select(RunRow.state, func.count()).where(RunRow.owner == owner, unfinished).group_by(RunRow.state)).all())
    size = session.scalar(select(func.sum(RunRow.disk_bytes)).where(RunRow.owner == owner))
    return Use(
        queued=states.get(RunState.QUEUED, 0), active=sum(states.get(state, 0) for state in ACTIVE),
        dollars=spending.of_owner(session, owner, now), disk_bytes=int(size or 0))
