"""Applies an owner's policy to a run: sets its prices, and decides whether it is accepted and may start or continue."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TypeVar

from moedisco_ray.core.config import HighMemoryPool, LowMemoryPool, MachineType, Owner, RunConfig
from service.domain.policies import Policy, UnreadablePolicy
from service.errors import AgainstPolicy

_Priced = TypeVar("_Priced", LowMemoryPool, HighMemoryPool, MachineType, Owner)


@dataclasses.dataclass(frozen=True)
class Use:
    """Current usage by an owner's runs.

    Attributes:
        queued: Number of queued runs.
        active: Number of runs that have, or may have, a driver.
        dollars: Dollars metered in this calendar month, including deleted runs.
        disk_bytes: Size of all data sets, run directories and checkpoints in other storage, as last measured (bytes).
    """

    queued: int = 0
    active: int = 0
    dollars: float = 0.0
    disk_bytes: int = 0


def priced(config: RunConfig, prices: Mapping[str, float]) -> tuple[RunConfig, list[str]]:
    """The configuration with the operator's prices.

    Args:
        config: Configuration as requested.
        prices: Operator's prices in dollars per worker-hour, by custom resource.

    Returns:
        The configuration to store and to plan with, and notes for the owner: which prices were replaced, and for which
        resources the configuration's own price applies.
    """
    notes: list[str] = []
    pools = config.pools
    low = _priced_pool("pools.low_memory", pools.low_memory, prices, notes)
    types = tuple(
        _priced_pool(f"pools.low_memory.types.{i}", each, prices, notes)
        for i, each in enumerate(pools.low_memory.types)
    )
    high = _priced_pool("pools.high_memory", pools.high_memory, prices, notes)
    owners = {name: _priced_pool(f"pools.owners.{name}", owner, prices, notes) for name, owner in pools.owners.items()}
    changed = pools.model_copy(
        update={"low_memory": low.model_copy(update={"types": types}), "high_memory": high, "owners": owners}
    )
    own = sorted({tag for _, tag in _needed(config) if tag not in prices})
    if own:
        notes.append(f"No operator price for {', '.join(own)}: the price in the configuration is used")
    return config.model_copy(update={"pools": changed}), notes


def check_readable(policy: Policy) -> None:
    """Refuse everything if the owner's policy cannot be read.

    Raises:
        AgainstPolicy: The policy cannot be read.
    """
    if isinstance(policy, UnreadablePolicy):
        raise AgainstPolicy(
            "policy", "unreadable", "nothing is allowed until an administrator has set your policy again"
        )


def check_pools(config: RunConfig, policy: Policy) -> None:
    """Refuse pools that the owner may not use.

    Raises:
        AgainstPolicy: A custom resource is not allowed, or the policy limits dollars but sets no price for it.
    """
    for field, tag in _needed(config):
        if policy.resources is not None and tag not in policy.resources:
            allowed = ", ".join(policy.resources) or "none"
            raise AgainstPolicy(
                f"config.{field}.resource", tag, f"is not among the resources that you may use: {allowed}"
            )
        if policy.dollars_per_month is not None and tag not in policy.prices:
            known = ", ".join(sorted(policy.prices)) or "none"
            raise AgainstPolicy(
                f"config.{field}.resource",
                tag,
                f"has no operator price, and your dollars are limited; use a priced resource: {known}",
            )


def check_priority(priority: int, policy: Policy) -> None:
    """Refuse a priority above the highest that the owner may use.

    Raises:
        AgainstPolicy: The priority is too high, or the policy cannot be read.
    """
    check_readable(policy)
    if priority > policy.highest_priority:
        raise AgainstPolicy(
            "priority", priority, f"is above your highest priority of {policy.highest_priority}; lower it"
        )


def check_queue(policy: Policy, use: Use) -> None:
    """Refuse another queued run if the owner has reached the limit.

    Raises:
        AgainstPolicy: The limit on queued runs is reached, or the policy cannot be read.
    """
    check_readable(policy)
    if policy.queued_runs is not None and use.queued >= policy.queued_runs:
        raise AgainstPolicy(
            "queued_runs",
            use.queued,
            f"you may have {policy.queued_runs} queued runs; wait until one starts, or cancel one",
        )


def check_room(policy: Policy, use: Use) -> None:
    """Refuse a new run if the owner's quota is used up.

    Raises:
        AgainstPolicy: The limit on queued runs, on dollars for this month, or on disk is reached.
    """
    check_queue(policy, use)
    if dollars_used_up(policy, use):
        raise AgainstPolicy(
            "dollars_per_month",
            round(use.dollars, 2),
            f"your {_dollars(policy.dollars_per_month)} for this month are used up; submit again next month, or ask "
            "the operator",
        )
    if disk_full(policy, use):
        raise AgainstPolicy(
            "disk_bytes",
            use.disk_bytes,
            f"your runs and data sets fill the {_gigabytes(policy.disk_bytes)} of disk that you may use; delete those "
            "that you do not need",
        )


def check_upload(policy: Policy, use: Use, more: int) -> None:
    """Refuse files that do not fit into the owner's quota.

    Args:
        policy: The owner's policy.
        use: The owner's current usage.
        more: Size of the files (bytes).

    Raises:
        AgainstPolicy: The limit on disk would be passed, or the policy cannot be read.
    """
    check_readable(policy)
    if policy.disk_bytes is not None and use.disk_bytes + more > policy.disk_bytes:
        raise AgainstPolicy(
            "disk_bytes",
            use.disk_bytes + more,
            f"these files do not fit into the {_gigabytes(policy.disk_bytes)} of disk that you may use; delete data "
            "sets or runs that you do not need",
        )


def dollars_used_up(policy: Policy, use: Use) -> bool:
    """Whether the owner has spent the dollars for this month."""
    return policy.dollars_per_month is not None and use.dollars >= policy.dollars_per_month


def disk_full(policy: Policy, use: Use) -> bool:
    """Whether the owner's run directories and data sets have reached the limit."""
    return policy.disk_bytes is not None and use.disk_bytes >= policy.disk_bytes


def wait_reason(tags: Iterable[str], policy: Policy, use: Use) -> str | None:
    """Why the policy does not let a queued run with these resource tags start; None if the run may start."""
    if isinstance(policy, UnreadablePolicy):
        return "its owner's policy cannot be read; an administrator has to set it again"
    refused = [tag for tag in tags if policy.resources is not None and tag not in policy.resources]
    if refused:
        return f"its owner may no longer use {', '.join(refused)}"
    if dollars_used_up(policy, use):
        return f"its owner's {_dollars(policy.dollars_per_month)} for this month are used up"
    if disk_full(policy, use):
        return f"its owner's runs and data sets fill the {_gigabytes(policy.disk_bytes)} of disk that they may use"
    return None


def month_of(time: float) -> str:
    """Calendar month (UTC) of a time in seconds since the epoch, such as `2026-11`."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m")


def next_month(time: float) -> float:
    """Start of the next calendar month (UTC), in seconds since the epoch."""
    now = datetime.fromtimestamp(time, UTC)
    year, month = (now.year + 1, 1) if now.month == 12 else (now.year, now.month + 1)
    return datetime(year, month, 1, tzinfo=UTC).timestamp()


def _needed(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Dotted path in the configuration, and custom resource, of every node type that the run needs."""
    for pool, _ in config.needed_pools:
        if isinstance(pool, LowMemoryPool) and pool.types:
            yield from ((f"pools.{pool.name}.types.{i}", each.resource) for i, each in enumerate(pool.types))
        else:
            yield pool.path, pool.resource


def _priced_pool(field: str, pool: _Priced, prices: Mapping[str, float], notes: list[str]) -> _Priced:
    price = prices.get(pool.resource)
    if price is None or price == pool.price_per_hour:
        return pool
    if pool.price_per_hour is not None and "price_per_hour" in pool.model_fields_set:
        notes.append(
            f"{field}.price_per_hour: the operator's price of {pool.resource}, ${price:g} an hour, "
            f"replaces {pool.price_per_hour:g}"
        )
    return pool.model_copy(update={"price_per_hour": price})


def _dollars(amount: float | None) -> str:
    return f"${amount or 0:,.2f}"


def _gigabytes(amount: int | None) -> str:
    return f"{(amount or 0) / 1e9:,.1f} GB"
