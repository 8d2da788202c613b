"""Converts database rows into the inputs of the decision functions in `service.domain`."""

from __future__ import annotations

from moedisco_ray.core.config import AnyPool
from moedisco_ray.core.stages import TRAINING
from service.database.quotas import Quotas
from service.database.tables import RunRow
from service.domain.admission import ActiveRun, ClusterCapacity, PoolNeed, PoolRoom, QueuedRun, RunLimits
from service.domain.outcome import AWAITED, UNREADABLE_STOP_SECONDS, ObservedState, Stop, final_event
from service.domain.policies import UnreadablePolicy
from service.domain.quotas import dollars_used_up, wait_reason
from service.domain.states import RunState
from service.errors import UnusableRun
from service.schemas import PoolList

_ON_LOW_MEMORY = [stage.name for stage in TRAINING if not stage.trains_whole][-1]
"""The last stage that trains on the low-memory pool."""


def observed_state(run: RunRow, now: float) -> ObservedState:
    """Input of `decide_outcome` for a run."""
    began, final = final_event(run.progress)
    return ObservedState(
        state=RunState(run.state),
        stop=run.stop,
        reason=run.reason,
        overdue=_overdue(run, now),
        futile=run.futile,
        advanced=run.mark > run.mark_at_start,
        began=began,
        final=final,
    )


def _overdue(run: RunRow, now: float) -> bool:
    """Whether a run that cannot be read has been stopping for too long: it is not metered."""
    unmetered = run.stop == "unreadable" or run.unreadable is not None
    return unmetered and run.state == RunState.STOPPING and now - run.updated > UNREADABLE_STOP_SECONDS


def awaiting(progress: dict[str, object]) -> dict[str, object]:
    """Mark in a run's progress that the next driver has not reported yet: `AWAITED` replaces the final event."""
    return {**progress, "ended": {"type": AWAITED}}


def queued(run: RunRow, quotas: Quotas) -> QueuedRun:
    """Input of `admit` for a queued run: one slot must be free, and enough slots for its smallest gang must exist.

    Raises:
        UnusableRun: This version cannot read the run, or cannot start it as it was asked for.
    """
    run.check_readable()
    run.check_repeatable()
    (low, slots), *others = _pools(run)
    needs = (PoolNeed(low.tags, slots, free=1), *(PoolNeed(pool.tags, workers, free=0) for pool, workers in others))
    tags = [tag for need in needs for tag in need.resources]
    held = budget_spent(run) or wait_reason(tags, quotas.policies.of(run.owner), quotas.use(run.owner))
    return QueuedRun(run.id, run.owner, needs, held)


def active(run: RunRow) -> ActiveRun:
    """Input of `admit` for an active run. Once its sub-models are trained, it no longer claims the low-memory pool.

    A run whose configuration this version refuses claims no slot of a pool; it counts as active until it has stopped.
    """
    stage = run.progress.get("stages", {}).get(_ON_LOW_MEMORY, {})
    try:
        pools = [pool for pool, _ in _pools(run) if pool.owner is None]
    except UnusableRun:
        return ActiveRun(run.owner, ())
    pool = pools[-1 if stage.get("status") in ("done", "reused") else 0]
    return ActiveRun(run.owner, (pool.tags,))


def limits(quotas: Quotas, runs: int) -> RunLimits:
    """Limits on active runs, in total and by owner."""
    policies = quotas.policies
    return RunLimits(
        runs, policies.default.active_runs, {owner: policies.of(owner).active_runs for owner in policies.owners}
    )


def _pools(run: RunRow) -> tuple[tuple[AnyPool, int], ...]:
    return run.settings.needed_pools


def cluster(pools: PoolList, *, grows: bool) -> ClusterCapacity | None:
    """Input of `admit` for the cluster; None if Ray does not answer."""
    if not pools.connected:
        return None
    return ClusterCapacity(
        {pool.resource: PoolRoom(pool.slots, pool.free, pool.pending) for pool in pools.items}, grows
    )


def stop_for_money(run: RunRow, quotas: Quotas) -> Stop | None:
    """Why a run must stop: for its budget, its owner's month, or an owner's policy that cannot be read.

    None if it may continue.
    """
    if budget_spent(run):
        return "budget"
    policy = quotas.policies.of(run.owner)
    if isinstance(policy, UnreadablePolicy):
        return "policy"
    return "month" if dollars_used_up(policy, quotas.use(run.owner)) else None


def budget_spent(run: RunRow) -> str | None:
    """Message that a run's budget is spent; None if money is left or the run has no budget."""
    if run.budget_dollars is None or run.dollars < run.budget_dollars:
        return None
    return f"its budget of ${run.budget_dollars:,.2f} is spent"
