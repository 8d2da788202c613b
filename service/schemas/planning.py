"""Pools of the cluster, quotas of owners, and estimates of runs."""

from __future__ import annotations

from moedisco_ray.plan import Plan
from service.domain.policies import Retention
from service.schemas.base import Document
from service.schemas.runs import Reused


class PoolNode(Document):
    """A Ray node."""

    id: str
    address: str
    alive: bool
    resources: dict[str, float]
    labels: dict[str, str]


class PoolStatus(Document):
    """A pool: the nodes that offer one custom resource."""

    resource: str
    slots: float
    """Slots of the pool; one worker uses one slot."""
    free: float
    """Slots that are not in use."""
    gpus: float
    nodes: list[PoolNode]
    price_per_hour: float | None
    """Operator's price for the caller (dollars per worker-hour); with null, the price in each run's configuration
    applies."""
    lost: int
    """Nodes of this pool that failed in the last 24 hours."""
    pending: int
    """Workers that wait for a slot."""


class PoolList(Document):
    """Every pool of the cluster."""

    connected: bool
    """Whether Ray answers."""
    items: list[PoolStatus]


class Share(Document):
    """A limit and how much of it is used."""

    used: float
    limit: float | None
    """Maximum usage; null means no limit."""


class Quota(Document):
    """An owner's limits and current usage."""

    owner: str
    resources: list[str] | None
    """Custom resources of the pools that the owner's runs may use; null allows all pools."""
    prices: dict[str, float]
    """Operator's prices in dollars per worker-hour, by custom resource; for other resources, the configuration's price
    applies."""
    highest_priority: int
    queued_runs: Share
    active_runs: Share
    dollars: Share
    """Dollars metered in this calendar month (UTC), including deleted runs."""
    month: str
    """Month, such as `2026-11`."""
    month_ends: float
    """Time at which the month ends and the count of dollars starts again at 0."""
    disk_bytes: Share
    """Size of all run directories and of their checkpoints in other storage, as last measured (bytes)."""
    retention: Retention


class SpentDollars(Document):
    """Dollars of a group of runs; a field that was not grouped by is null."""

    owner: str | None
    project: str | None
    """Id of the project; empty if the dollars were metered before the owner had one."""
    project_name: str | None
    """Name of the project; null if it was deleted, or the caller may not see it."""
    month: str | None
    """Calendar month (UTC), such as `2026-11`."""
    dollars: float


class SpendingPage(Document):
    """Metered dollars by group, newest month first, including those of deleted runs."""

    items: list[SpentDollars]


class Estimate(Plan):
    """Estimated resources, time and cost of a run at the operator's prices."""

    notes: tuple[str, ...] = ()
    """Notes on which of the configuration's prices the operator's prices replaced, and which ones still apply."""


class RetryEstimate(Estimate):
    """Estimated resources, time and cost of a retry; `bill` has the cost of all stages, as if none were reused."""

    reuses: tuple[Reused, ...] = ()
    """Stages that are taken from other runs, if the files that they were made from are still the same."""
    dollars_with_reuse: float | None
    """Cost of the stages that the retry makes itself (dollars); null if it cannot be estimated."""
    reuse_in_words: str
    """Both in a sentence, such as `reuses corpus, seed of docs: $0.38 instead of $7.10`."""
