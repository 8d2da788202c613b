"""What own cards cost, which have no price per hour: the energy that they take, and the time that they are idle."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pydantic import BaseModel

from moedisco_ray.core.config import AnyPool, LowMemoryPool, Pool, RunConfig
from moedisco_ray.core.records.bill import Line
from moedisco_ray.plan.reading import StageEstimate

_LEAST_IDLE = 0.1
"""Smallest idle share of all cards' time that a plan mentions."""


class Idle(BaseModel, frozen=True, defer_build=True):
    """Cards of a pool that have nothing to do for a part of the run."""

    pool: str
    cards: int
    """Number of the pool's cards."""
    idle: int
    """Number of them that are idle at the same time."""
    share: float
    """Part of the run's time for which at least `idle` of the cards are idle."""

    def __str__(self) -> str:
        name = self.pool.replace("_", "-")
        return f"{self.idle} of {self.cards} {name} cards are idle for {100 * self.share:.0f} % of the time"


def kilowatt_hours(lines: Iterable[Line], config: RunConfig) -> float | None:
    """Energy of the cards while they hold work, at the power of their data sheets; without machines and idle cards.

    Args:
        lines: Lines of a bill.
        config: The run's configuration.

    Returns:
        The energy (kWh); None if no card works, if a pool does not name its card, or if the time of some work is
        unknown.
    """
    total: float | None = None
    for each in lines:
        pool = config.pools.at(each.pool)
        if not pool.gpu:
            continue
        if pool.gpu_card is None or each.worker_seconds is None:
            return None
        total = (total or 0.0) + each.worker_seconds / 3600 * pool.gpu_card.watts / 1000
    return total


def idle_cards(config: RunConfig, estimates: Sequence[StageEstimate], given: RunConfig) -> tuple[Idle, ...]:
    """The idle cards that explain most of the idle time of the low-memory pool, and of a high-memory pool of own cards.

    Rented large cards are started for the last stages only. Nothing is said of cards that are idle for less than a
    tenth of their time, nor if the time of a stage with cards is unknown. Stages of the head of unknown time are left
    out.

    Args:
        config: The configuration of the run.
        estimates: Estimates of its stages.
        given: The configuration before a recipe changed it, which has all of the user's own cards.
    """
    low = config.pools.low_memory
    pools = (pool for pool, _ in config.needed_pools if pool is low or (pool.owner is None and not pool.price_per_hour))
    owned = {pool.key: pool for pool, _ in given.needed_pools if not pool.price_per_hour}
    found = (_idle(pool, _count(owned.get(pool.key, pool)), estimates) for pool in pools if pool.gpu)
    return tuple(filter(None, found))


def _count(pool: AnyPool) -> int:
    return pool.max_workers if isinstance(pool, LowMemoryPool) else pool.most_workers


def _idle(pool: AnyPool, cards: int, estimates: Sequence[StageEstimate]) -> Idle | None:
    if any(each.seconds is None and each.lines for each in estimates):
        return None
    timed = [(each.seconds or 0.0, _busy(pool, each)) for each in estimates]
    total = sum(seconds for seconds, _ in timed)
    if not total or not any(busy for _, busy in timed):
        return None
    shares = dict.fromkeys(range(1, cards + 1), 0.0)
    for seconds, busy in timed:
        for idle in range(1, math.floor(cards - busy + 1e-6) + 1):
            shares[idle] += seconds / total
    most = max(shares, key=lambda idle: idle * shares[idle])
    if most * shares[most] < _LEAST_IDLE * cards:
        return None
    return Idle(pool=pool.name, cards=cards, idle=most, share=shares[most])


def _busy(pool: Pool, estimate: StageEstimate) -> float:
    """Mean number of a pool's cards that hold work of a stage."""
    held = sum(each.worker_seconds or 0.0 for each in estimate.lines if each.pool.partition(".")[0] == pool.name)
    return held / estimate.seconds if estimate.seconds else 0.0
