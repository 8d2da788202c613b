"""Sync points: the steps at which members combine their weights, and the members that take part.

Between two sync points every member trains on its own; then their weights become one (Douillard et al., "DiLoCo",
arXiv 2311.08105). The members of the seed phase combine all weights, and end with a sync point. Sub-models combine
their backbones, and train from their last sync point up to the merge.

The weights, laid end to end, are divided into equal ranges. Each member that waits at the sync point combines one range
after the other, from what all members have stored; so no machine reads all weights of all members.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

Scope = Literal["backbone", "all"]
"""Weights that members exchange: the backbone of sub-models that have their own experts, or all weights of one common
model."""


BLOCK = 256
"""Elements with one scale in codes of 4 bits; see `training.sync.codec`."""
BLOCK_BYTES = 4 + BLOCK // 2
"""Size of a block of codes: a scale in float32, and half a byte for each element."""


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


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A member that has published its weights for a sync point.

    Attributes:
        name: Name of the member.
        number: Number of the sync point.
        tokens: Tokens that the member has trained on since it last loaded common weights.
        ranges: Size (bytes) and SHA-256 of each range of its weights.
    """

    name: str
    number: int
    tokens: int
    ranges: tuple[tuple[int, str], ...]

    @property
    def nbytes(self) -> int:
        """Size of the member's weights (bytes)."""
        return sum(size for size, _ in self.ranges)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a member does next at a sync point.

    Attributes:
        action: `arrive`: send an `Arrival`; `wait`: wait for other members; `combine`: combine a range; `stay`: wait
            until others have combined the last ranges, which takes only a moment; `load`: load the common weights.
        number: The range to combine, or the sync point whose weights to load.
    """

    action: Literal["arrive", "wait", "combine", "stay", "load"]
    number: int = 0


@dataclasses.dataclass(frozen=True)
class SyncProgress:
    """The progress of a sync point.

    Attributes:
        arrived: Names of the members that have published their weights.
        ranges: Number of ranges to combine; 0 until the roster is recorded.
        combined: Number of ranges that are combined.
    """

    arrived: frozenset[str]
    ranges: int
    combined: int


def coded_bytes(elements: int) -> int:
    """Size of the codes of some elements (bytes); the last block is filled with zeros."""
    return -(-elements // BLOCK) * BLOCK_BYTES


def range_bounds(elements: int, ranges: int, block: int = 1) -> list[tuple[int, int]]:
    """First element of each range, and that of the next one: equal ranges of weights that are laid end to end.

    Args:
        elements: Number of all elements.
        ranges: Number of ranges.
        block: Number of elements that are not divided; ranges are equal up to that many.
    """
    blocks = -(-elements // block)
    cuts = [min(elements, blocks * i // ranges * block) for i in range(ranges + 1)]
    return list(itertools.pairwise(cuts))


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
