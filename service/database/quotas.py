"""Usage of owners: runs, disk and metered dollars."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.database import datasets, policies, runs, sharers
from service.database.access_tables import Spending
from service.database.session import lock_until_commit
from service.database.tables import RunRow
from service.domain.policies import Policies
from service.domain.quotas import Use, month_of
from service.domain.states import ACTIVE, RunState


@dataclasses.dataclass(frozen=True)
class Quotas:
    """Policies and usage of all owners at one time.

    Attributes:
        uses: Usage by owner; owners that use nothing are absent.
    """

    policies: Policies
    uses: Mapping[str, Use]

    def use(self, owner: str) -> Use:
        return self.uses.get(owner, Use())


def load(session: Session, now: float) -> Quotas:
    """Read the policies and usage of all owners."""
    queued, active = runs.owner_counts(session, [RunState.QUEUED]), runs.owner_counts(session, ACTIVE)
    dollars, size = month_dollars(session, now), _owner_bytes(session)
    uses = {
        owner: Use(queued.get(owner, 0), active.get(owner, 0), dollars.get(owner, 0.0), size.get(owner, 0))
        for owner in {*queued, *active, *dollars, *size}
    }
    return Quotas(policies.load(session), uses)


def use_to_change(session: Session, owner: str, now: float) -> Use:
    """Usage of one owner, locked until this transaction ends, so that a check against the limits stays valid."""
    lock_until_commit(session, "quota", owner)
    return use_of(session, owner, now)


def use_of(session: Session, owner: str, now: float) -> Use:
    unfinished = RunRow.state.in_([RunState.QUEUED, *ACTIVE])
    states = dict(
        session.execute(
            select(RunRow.state, func.count()).where(RunRow.owner == owner, unfinished).group_by(RunRow.state)
        ).all()
    )
    return Use(
        queued=states.get(RunState.QUEUED, 0),
        active=sum(states.get(state, 0) for state in ACTIVE),
        dollars=owner_dollars(session, owner, now),
        disk_bytes=_owner_bytes(session, owner).get(owner, 0),
    )


def _owner_bytes(session: Session, owner: str | None = None) -> dict[str, int]:
    """Size of run directories and data sets by owner (bytes); with `owner`, of this owner alone."""
    return dict(Counter(sharers.owner_bytes(session, owner)) + Counter(datasets.owner_bytes(session, owner)))


def add_dollars(session: Session, owner: str, project: str, dollars: float, now: float) -> None:
    """Add metered dollars to an owner's current calendar month in a project; deleting runs does not subtract them."""
    insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
    row = insert(Spending).values(owner=owner, project=project, month=month_of(now), dollars=dollars)
    session.execute(
        row.on_conflict_do_update(
            index_elements=[Spending.owner, Spending.project, Spending.month],
            set_={"dollars": Spending.dollars + row.excluded.dollars},
        )
    )


def month_dollars(session: Session, now: float) -> dict[str, float]:
    query = select(Spending.owner, func.sum(Spending.dollars)).where(Spending.month == month_of(now))
    return dict(session.execute(query.group_by(Spending.owner)).all())


def owner_dollars(session: Session, owner: str, now: float) -> float:
    query = select(func.sum(Spending.dollars)).where(Spending.owner == owner, Spending.month == month_of(now))
    return session.scalar(query) or 0.0
