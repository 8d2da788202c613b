"""RateLimiter that the operator sets for each owner: pools, prices, priority, runs, dollars, disk, and how long runs are kept."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from moedisco_ray.core.config import PricePerHour, Tag

Owner = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.@-]{0,63}$")]
"""In whose name a token acts."""
MOST_OWNERS = 10_000
HIGHEST_PRIORITY = 100


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Retention(_Document):
    """How long finished runs are kept. A run is removed as soon as one of the rules says so; with neither it stays."""

    days: Annotated[float, Field(gt=0, le=36_500)] | None = None
    """Days after its end for which a run is kept; null: no limit."""
    finished_runs: Annotated[int, Field(ge=1)] | None = None
    """Finished runs of one owner that are kept, the newest ones; null: no limit."""


class Policy(_Document):
    """RateLimiter of one owner. In an owner's own entry, what is left out is as in the default entry."""

    resources: Annotated[list[Tag], Field(max_length=256)] | None = None
    """Custom resources of the pools that the owner's runs may use; null: any."""
    prices: Annotated[dict[Tag, PricePerHour], Field(max_length=256)] = Field(default_factory=dict)
    """Dollars per worker-hour by custom resource, in place of `price_per_hour` in a run's configuration. An owner's own prices
    are added to the default's. A resource that is not listed costs what the configuration says."""
    highest_priority: Annotated[int, Field(ge=-HIGHEST_PRIORITY, le=HIGHEST_PRIORITY)] = 0
    """Highest priority of a run; an administrator may set any."""
    queued_runs: Annotated[int, Field(ge=0)] | None = 100
    """Most queued runs; null: no limit."""
    active_runs: Annotated[int, Field(ge=0)] | None = 2
    """Most runs that train at the same time; null: no limit but the service's own."""
    dollars_per_month: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Most metered dollars in a calendar month (UTC). Once they are used, running runs are stopped with a checkpoint and queued
    ones wait for the next month; null: no limit."""
    disk_bytes: Annotated[int, Field(ge=0, le=2**60)] | None = None
    """Most bytes of run directories, as last measured; null: no limit."""
    retention: Retention = Retention()
    """How long finished runs are kept."""


class Policies(_Document):
    """The policy of every owner."""

    default: Policy = Policy()
    """Of owners without an entry of their own."""
    owners: Annotated[dict[Owner, Policy], Field(max_length=MOST_OWNERS)] = Field(default_factory=dict)
    """Entries by owner; what an entry leaves out is as in the default."""

    def of(self, owner: str) -> Policy:
        """The limits that hold for an owner."""
        entry = self.owners.get(owner)
        if entry is None:
            return self.default
        changes = {name: getattr(entry, name) for name in entry.model_fields_set}
        return self.default.model_copy(update={**changes, "prices": {**self.default.prices, **entry.prices}})
