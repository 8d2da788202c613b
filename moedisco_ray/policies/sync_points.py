"""When the backbones of the sub-models meet, and which of them a round combines.

A round is what happens between two meetings: every sub-model makes some steps by itself, then their backbones become one
(Douillard et al., "DiLoCo", arXiv 2311.08105). The last round ends with the merge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class SyncMembers:
    """Who a round combines.

    Attributes:
        members: Those whose backbones are there, in their order.
        late: Those it does not wait for any longer; each takes the newest backbone when it arrives, and is in the next round.
    """

    members: tuple[str, ...]
    late: tuple[str, ...] = ()


def meetings(steps: Sequence[int], every: int) -> list[tuple[int, ...]]:
    """After which of its steps each sub-model meets the others.

    All have equally many meetings, so that all end in the same round and none goes into the merge with a backbone
    that the others have left behind: the longest meets every `every` steps, a shorter one at the same shares of its own.

    Args:
        steps: Of each sub-model.
        every: Steps of the longest between two meetings. Raised where the shortest would make none.
    """
    longest = max(steps)
    every = max(every, -(-longest // min(steps)))
    number = meetings_of(longest, every)
    return [tuple(mine * meeting * every // longest for meeting in range(1, number + 1)) for mine in steps]


def meetings_of(steps: int, every: int) -> int:
    """How many meetings a sub-model of so many steps has; the merge is at least half a round after the last."""
    return max(0, (2 * steps - every) // (2 * every))


def gather(alive: Sequence[str], arrived: Mapping[str, float], now: float, patience: float | None) -> SyncMembers | None:
    """Whom to combine.

    Args:
        alive: Those that train, wait or are finished; not those that were given up.
        arrived: When each arrived, in seconds, of those that did.
        now: Seconds, on the same clock.
        patience: Seconds that are waited for the others once half of them are there; None: until all are.

    Returns:
        None: wait.
    """
    here = tuple(name for name in alive if name in arrived)
    missing = tuple(name for name in alive if name not in arrived)
    if not here or (missing and (patience is None or now < _half(alive, arrived) + patience)):
        return None
    return SyncMembers(here, missing)


def _half(alive: Collection[str], arrived: Mapping[str, float]) -> float:
    times = sorted(arrived[name] for name in alive if name in arrived)
    needed = -(-len(alive) // 2)
    return times[needed - 1] if len(times) >= needed else float("inf")


def shares(tokens: Sequence[int]) -> list[float]:
    """Weights of the members, by the tokens of the round; they sum to 1."""
    return [count / sum(tokens) for count in tokens]
