"""Stored policies: one row for the default policy, and one for each owner with a policy.

A policy that this version cannot read becomes `UNREADABLE`, which allows nothing; the policies of other owners apply as
always.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.database.access_tables import OwnerPolicy
from service.database.documents import Unreadable
from service.database.tables import RunRow
from service.domain.policies import UNREADABLE, Policies, Policy

_DEFAULT = "*"


def load(session: Session) -> Policies:
    """Load all policies; fields that were never set have the defaults of `Policies`."""
    rows = session.scalars(select(OwnerPolicy).order_by(OwnerPolicy.owner))
    return _policies({row.owner: row.limits for row in rows})


def of(session: Session, owner: str) -> Policy:
    """The policy that applies to an owner."""
    rows = session.scalars(select(OwnerPolicy).where(OwnerPolicy.owner.in_([_DEFAULT, owner])))
    return _policies({row.owner: row.limits for row in rows}).of(owner)


def prices_of(session: Session, run: RunRow) -> dict[str, float]:
    """The operator's present prices of the resources that a run uses (dollars per worker-hour), by custom resource."""
    prices, tags = of(session, run.owner).prices, {pool.resource for pool in run.pools.by_key.values()}
    return {tag: price for tag, price in prices.items() if tag in tags}


def replace(session: Session, policies: Policies, now: float) -> None:
    session.execute(delete(OwnerPolicy))
    for owner, policy in ((_DEFAULT, policies.default), *policies.owners.items()):
        session.add(_row(owner, policy, now))
    session.flush()


def put(session: Session, owner: str, policy: Policy, now: float) -> None:
    session.execute(delete(OwnerPolicy).where(OwnerPolicy.owner == owner))
    session.add(_row(owner, policy, now))  # a merge would keep a damaged document, which reads as an empty one
    session.flush()


def remove(session: Session, owner: str) -> bool:
    """Delete one owner's policy, so that the default policy applies; returns whether there was one."""
    deleted = session.execute(delete(OwnerPolicy).where(OwnerPolicy.owner == owner).returning(OwnerPolicy.owner))
    return owner != _DEFAULT and deleted.scalar() is not None


def _policies(limits: dict[str, dict[str, Any]]) -> Policies:
    owners = {owner: _policy(document) for owner, document in limits.items()}
    default = owners.pop(_DEFAULT, None)
    # Without validation, which would refuse all policies for one damaged name.
    return (
        Policies.model_construct(owners=owners)
        if default is None
        else Policies.model_construct(default=default, owners=owners)
    )


def _policy(document: dict[str, Any]) -> Policy:
    if isinstance(document, Unreadable):
        return UNREADABLE
    try:
        return Policy.model_validate(document)
    except ValidationError:
        return UNREADABLE


def _row(owner: str, policy: Policy, now: float) -> OwnerPolicy:
    return OwnerPolicy(owner=owner, limits=policy.model_dump(mode="json", exclude_unset=True), updated=now)
