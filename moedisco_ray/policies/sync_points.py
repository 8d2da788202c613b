"""Sync points: the steps at which members combine their weights, and the members that take part.

Between two sync points every member trains on its own; then their weights become one (Douillard et al., "DiLoCo",
arXiv 2311.08105). The members of the seed phase combine all weights, and end with a sync point. Sub-models combine
their backbones, and train from their last sync point up to the merge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

Scope = Literal["backbone", "all"]
"""Weights that members exchange: the backbone of sub-models that have their own experts, or all weights of one common
model."""


@dataclasses.dataclass(frozen=True)
class SyncMembers:
    """The members of a sync point.

    Attributes:
        members: Members whose weights are combined, in their order.
        late: Members that are not waited for any longer; each loads the newest common weights when it arrives and joins
            the next sync point.
    """

    members: tuple[str, ...]
    late: tuple[str, ...] = ()


def sync_steps(steps: Sequence[int], every: int) -> list[tuple[int, ...]]:
    """The sync points of each sub-model; each is given as the number of steps that the sub-model makes before it.

    All sub-models have the same number of sync points, so that none enters the merge with an outdated backbone. The
    sub-model with the most steps syncs every `every` steps; a shorter one syncs at the same fractions of its own steps.

    Args:
        steps: Steps of each sub-model.
        every: Steps between two sync points of the longest sub-model. Increased if the shortest sub-model would
            otherwise make no step between two sync points.
    """
    longest = max(steps)
    every = max(every, -(-longest // min(steps)))
    number = sync_count(longest, every)

    def points(own: int) -> tuple[int, ...]:
        return tuple(own * point * every // longest for point in range(1, number + 1))

    return [points(own) for own in steps]


def common_sync_steps(steps: Sequence[int], every: int) -> list[tuple[int, ...]]:
    """The sync points of each member that trains one common model: the same ones, and one after its own last step.

    Args:
        steps: Steps of each member, which differ by at most one.
        every: Steps between two sync points.
    """
    [common] = sync_steps([min(steps)], every)
    return [(*common, own) for own in steps]


def sync_count(steps: int, every: int) -> int:
    """Number of sync points of a sub-model; at least `every` / 2 steps remain between the last one and the merge."""
    return max(0, (2 * steps - every) // (2 * every))


def ready_members(
    alive: Sequence[str], arrived: Mapping[str, float], now: float, patience: float | None
) -> SyncMembers | None:
    """The members whose weights are combined now; None if the sync point must wait for more members.

    Args:
        alive: Members that train, wait or are finished; not those that were given up.
        arrived: Arrival time in seconds of each member that has reached the sync point.
        now: Current time in seconds, on the same clock.
        patience: Seconds to wait for the others once half of the members have arrived; None means to wait for all
            members.
    """
    ready = tuple(name for name in alive if name in arrived)
    missing = tuple(name for name in alive if name not in arrived)
    if not ready or (missing and (patience is None or now < _half_arrived_at(alive, arrived) + patience)):
        return None
    return SyncMembers(ready, missing)


def _half_arrived_at(alive: Collection[str], arrived: Mapping[str, float]) -> float:
    times = sorted(arrived[name] for name in alive if name in arrived)
    needed = -(-len(alive) // 2)
    return times[needed - 1] if len(times) >= needed else float("inf")


def token_weights(tokens: Sequence[int]) -> list[float]:
    """Weights of the members in proportion to their tokens since the last sync point; they sum to 1."""
    return [count / sum(tokens) for count in tokens]
