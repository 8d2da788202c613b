"""Pools and prices."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from service.schemas.base import Document, example


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
    """From the price book; null: each run's configuration says."""
    lost: int
    """Nodes of this pool that died in the last 24 hours."""
    pending: int
    """Workers that the autoscaler was asked for and has not brought yet."""


class Pools(Document):
    """Every pool of the cluster."""

    connected: bool
    """Whether Ray answers."""
    items: list[PoolStatus]


class PriceEntry(Document):
    """An entry of the price book."""

    model_config = example(resource="low_mem_gpu", dollars_per_hour=0.35, since=1_760_000_000.0)

    resource: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.-]{0,63}$")]
    dollars_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    since: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)] | None = None
    """From when; null: now."""


class PriceBook(Document):
    """All entries, oldest first."""

    items: list[PriceEntry]
