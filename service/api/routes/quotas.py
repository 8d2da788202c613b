"""Routes of policies, for administrators, and of quotas, which each owner may read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, get_args

from fastapi import APIRouter, Path, Query
from sqlalchemy.orm import Session

from service.api.bodies import StrictRoute
from service.api.context import InContext, ServiceContext
from service.api.openapi import problems
from service.api.security import SIGNED_IN, Admin, Caller, Reader, require_token
from service.api.submission import note
from service.database import access_tables, policies, projects, quotas, spending
from service.domain.policies import HIGHEST_PRIORITY, Owner, Policies, Policy
from service.domain.quotas import month_of, next_month
from service.errors import Conflict, Forbidden, NotFound
from service.schemas import Quota, Share, SpendingPage, SpentDollars

router = APIRouter(prefix="/v1", tags=["policies"], route_class=StrictRoute, dependencies=SIGNED_IN)

_GROUPS = get_args(spending.Group)
_OwnerName = Annotated[Owner, Path(description="Owner of the policy.", examples=["ann"])]


@router.get("/policies", responses=problems(), response_model_exclude_unset=True)
def get_policies(caller: Admin, context: InContext) -> Policies:
    """Get all policies, each with only the fields that were set.

    Other fields take their values from the default policy.

    Fields that the default policy does not set have the documented defaults.
    """
    del caller
    with context.database.read() as session:
        return policies.load(session)


@router.put("/policies", responses=problems(409, body=True), response_model_exclude_unset=True)
def set_policies(body: Policies, caller: Admin, context: InContext) -> Policies:
    """Replace all policies; not allowed in a browser session."""
    require_token(caller)
    now = context.now()
    with context.database.write() as session:
        _check_unlocked(context)
        policies.replace(session, body, now)
        note(
            session,
            caller,
            "policies.set",
            "policies",
            now=now,
            detail=body.model_dump(mode="json", exclude_unset=True),
        )
    context.wake_reconciler()
    return body


@router.put("/policies/owners/{owner}", responses=problems(409, body=True), response_model_exclude_unset=True)
def set_policy(owner: _OwnerName, body: Policy, caller: Admin, context: InContext) -> Policy:
    """Replace one owner's policy; omitted fields take their values from the default policy.

    Not allowed in a browser session.
    """
    require_token(caller)
    now = context.now()
    with context.database.write() as session:
        _check_unlocked(context)
        policies.put(session, owner, body, now)
        note(session, caller, "policy.set", owner, now=now, detail=body.model_dump(mode="json", exclude_unset=True))
    context.wake_reconciler()
    return body


@router.delete("/policies/owners/{owner}", status_code=204, responses=problems(404, 409))
def delete_policy(owner: _OwnerName, caller: Admin, context: InContext) -> None:
    """Delete one owner's policy, so that the default policy applies; not allowed in a browser session."""
    require_token(caller)
    now = context.now()
    with context.database.write() as session:
        _check_unlocked(context)
        if not policies.remove(session, owner):
            raise NotFound(f"owner {owner} has no policy entry")
        note(session, caller, "policy.delete", owner, now=now, detail={})
    context.wake_reconciler()


@router.get("/quota", responses=problems())
def get_quota(
    caller: Reader,
    context: InContext,
    owner: Annotated[
        str | None, Query(max_length=64, description="Owner (for administrators); by default the caller.")
    ] = None,
) -> Quota:
    """Get an owner's limits and current usage."""
    if owner is not None and owner != caller.owner and not caller.admin:
        raise Forbidden("only an administrator may read another owner's quota; leave out `owner` to read yours")
    with context.database.read() as session:
        return _quota(session, caller, owner or caller.owner, context.now())


@router.get("/spending", responses=problems())
def get_spending(
    caller: Reader,
    context: InContext,
    group_by: Annotated[
        str,
        Query(
            pattern=r"^(owner|project|month)(,(owner|project|month)){0,2}$",
            description="Fields to group by, separated by commas.",
            examples=["project,month"],
        ),
    ] = "owner,project,month",
    month: Annotated[
        str | None, Query(pattern=r"^[0-9]{4}-[0-9]{2}$", description="Only this month (UTC).", examples=["2026-11"])
    ] = None,
) -> SpendingPage:
    """Get what was spent: on the caller's runs, and in the caller's projects; for an administrator, all of it.

    Dollars stay with the project to which their run belonged when they were metered.
    """
    by = [field for field in _GROUPS if field in group_by.split(",")]
    with context.database.read() as session:
        found = spending.grouped(session, caller.person, by, month)
        named = {row.id: row.name for row in _visible(session, caller, found)}
    items = [SpentDollars(**vars(each), project_name=named.get(each.project or "")) for each in found]
    return SpendingPage(items=items)


def _visible(session: Session, caller: Caller, found: Sequence[spending.Spent]) -> list[access_tables.Project]:
    """The projects of groups that the caller may see."""
    ids = {each.project for each in found if each.project}
    return projects.by_id(session, projects.roles(session, caller.person, ids))


def _quota(session: Session, caller: Caller, owner: str, now: float) -> Quota:
    policy, use = policies.of(session, owner), quotas.use_of(session, owner, now)
    own = caller.admin and owner == caller.owner
    return Quota(
        owner=owner,
        resources=policy.resources,
        prices=policy.prices,
        highest_priority=HIGHEST_PRIORITY if own else policy.highest_priority,
        queued_runs=Share(used=use.queued, limit=policy.queued_runs),
        active_runs=Share(used=use.active, limit=policy.active_runs),
        dollars=Share(used=use.dollars, limit=policy.dollars_per_month),
        month=month_of(now),
        month_ends=next_month(now),
        disk_bytes=Share(used=use.disk_bytes, limit=policy.disk_bytes),
        retention=policy.retention,
    )


def _check_unlocked(context: ServiceContext) -> None:
    if context.settings.policies is not None:
        raise Conflict(
            f"the policies come from {context.settings.policies} (`moedisco serve --policies`); change that file and "
            "restart the service"
        )
