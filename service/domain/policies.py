"""Limits that the operator sets for each owner: pools, prices, priority, runs, dollars, disk and retention."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from moedisco_ray.core.config import PricePerHour, Tag

Owner = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.@-]{0,63}$")]
"""Name of the user or team that tokens act for and runs belong to."""
MOST_OWNERS = 10_000
HIGHEST_PRIORITY = 100


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Retention(_Document):
    """How long finished runs are kept. A run is removed as soon as one rule applies; without rules all runs stay."""

    days: Annotated[float, Field(gt=0, le=36_500)] | None = None
    """Days for which a run is kept after its end; null means no limit."""
    finished_runs: Annotated[int, Field(ge=1)] | None = None
    """Number of newest finished runs that are kept for each owner; null means no limit."""


class Policy(_Document):
    """Limits of one owner. Fields that an owner's policy omits take their values from the default policy."""

    resources: Annotated[list[Tag], Field(max_length=256)] | None = None
    """Custom resources of the pools that the owner's runs may use; null allows all pools."""
    prices: Annotated[dict[Tag, PricePerHour], Field(max_length=256)] = Field(default_factory=dict)
    """Dollars per worker-hour by custom resource; they replace `price_per_hour` of a run's configuration. An owner's
    prices are added to the default prices. For a resource that is not listed, the configuration's price applies. A
    change counts for workers that take slots after it; those that hold slots keep the price at which they took them."""
    highest_priority: Annotated[int, Field(ge=-HIGHEST_PRIORITY, le=HIGHEST_PRIORITY)] = 0
    """Highest priority of a run; an administrator may set any."""
    queued_runs: Annotated[int, Field(ge=0)] | None = 100
    """Maximum number of queued runs; null means no limit."""
    active_runs: Annotated[int, Field(ge=0)] | None = 2
    """Maximum number of runs that are active at the same time; with null only the limit of the service applies."""
    dollars_per_month: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Limit on metered dollars in a calendar month (UTC). When it is reached, active runs stop with a checkpoint and
    queued runs wait for the next month; null means no limit."""
    disk_bytes: Annotated[int, Field(ge=0, le=2**60)] | None = None
    """Limit on the size of all run directories, of their checkpoints, as last measured, and of data sets (bytes); null
    means no limit."""
    retention: Retention = Retention()
    """How long finished runs are kept."""


class UnreadablePolicy(Policy):
    """Stands for a stored policy that this version cannot read: it allows nothing, and removes no run."""


UNREADABLE = UnreadablePolicy(
    resources=[], highest_priority=-HIGHEST_PRIORITY, queued_runs=0, active_runs=0, dollars_per_month=0, disk_bytes=0
)


class Policies(_Document):
    """Policies of all owners."""

    default: Policy = Policy()
    """Policy of owners that have none of their own."""
    owners: Annotated[dict[Owner, Policy], Field(max_length=MOST_OWNERS)] = Field(default_factory=dict)
    """Policies by owner; omitted fields take their values from the default policy."""

    def of(self, owner: str) -> Policy:
        """The policy that applies to an owner; `UNREADABLE` if a part of it cannot be read."""
        entry = self.owners.get(owner)
        if entry is None or isinstance(self.default, UnreadablePolicy):
            return self.default
        if isinstance(entry, UnreadablePolicy):
            return entry
        changes = {name: getattr(entry, name) for name in entry.model_fields_set}
        return self.default.model_copy(update={**changes, "prices": {**self.default.prices, **entry.prices}})

    @property
    def unreadable(self) -> list[str]:
        """Names of the policies that this version cannot read: `default`, and owners."""
        named = {"default": self.default, **self.owners}
        return [name for name, policy in named.items() if isinstance(policy, UnreadablePolicy)]
