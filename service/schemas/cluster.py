"""Pools of the cluster."""

from __future__ import annotations

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
