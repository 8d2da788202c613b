"""Pools of the cluster, quotas of owners, and estimates of runs."""

from __future__ import annotations

from moedisco_ray.plan import Plan
from service.domain.policies import Retention
from service.schemas.base import Document


class PoolNode(Document):
    """A Ray node."""

    id: str
    address: str
    alive: bool
    resources: dict[str, float]
    labels: dict[str, str]


class PoolStatus(Document):
    """Machines that carry one tag."""

    resource: str
    slots: float
    """Workers there is room for."""
    free: float
    gpus: float
    nodes: list[PoolNode]
    price_per_hour: float | None
    """The operator's price for the caller; null: each run's configuration says."""
    lost: int
    """Nodes of this pool that died in the last 24 hours."""
    pending: int
    """Workers that the autoscaler was asked for and has not brought yet."""


class PoolList(Document):
    """Every pool of the cluster."""

    connected: bool
    """Whether Ray answers."""
    items: list[PoolStatus]


class Share(Document):
    """How much of a limit is used."""

    used: float
    limit: float | None
    """Null: no limit."""


class Quota(Document):
    """Limits of an owner, and what is used of them."""

    owner: str
    resources: list[str] | None
    """Custom resources of the pools that runs may use; null: any."""
    prices: dict[str, float]
    """The operator's dollars per worker-hour by custom resource; what is not listed costs what the configuration says."""
    highest_priority: int
    queued_runs: Share
    active_runs: Share
    dollars: Share
    """Metered dollars of this calendar month (UTC), deleted runs included."""
    month: str
    """Such as 2026-11."""
    month_ends: float
    """When the dollars are counted from 0 again."""
    disk_bytes: Share
    """Of all run directories, as last measured; checkpoints in other storage are not counted."""
    retention: Retention


class Estimate(Plan):
    """A plan at the operator's prices."""

    notes: tuple[str, ...] = ()
    """Prices that were replaced, and resources whose price is the configuration's own."""
