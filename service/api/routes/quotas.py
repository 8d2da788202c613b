"""Routes of policies, for administrators, and of quotas, which each owner may read."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from sqlalchemy.orm import Session

from service.api.bodies import StrictRoute
from service.api.context import InContext, ServiceContext
from service.api.openapi import problems
from service.api.security import SIGNED_IN, Admin, Caller, Reader, require_token
from service.api.submission import note
from service.database import policies, quotas
from service.domain.policies import HIGHEST_PRIORITY, Owner, Policies, Policy
from service.domain.quotas import month_of, next_month
from service.errors import Conflict, Forbidden, NotFound
from service.schemas import Quota, Share

router = APIRouter(prefix="/v1", tags=["policies"], route_class=StrictRoute, dependencies=SIGNED_IN)

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
