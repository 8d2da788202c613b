"""Where in a pool of several node types a sub-model goes: where it fits for the least money."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence


@dataclasses.dataclass(frozen=True)
class NodeType:
    """One kind of machine of a pool.

    Attributes:
        name: Tells it from the others.
        memory_gb: What a worker may use.
        price_per_hour: Dollars per worker-hour.
        speed: Training speed, relative to anything that is the same for all.
        free: Workers that could start now.
    """

    name: str
    memory_gb: float
    price_per_hour: float
    speed: float
    free: int

    @property
    def price_of_work(self) -> float:
        """Dollars for what speed 1 does in an hour: a dear machine that is quick may be the cheaper one."""
        return self.price_per_hour / self.speed


@dataclasses.dataclass(frozen=True)
class Need:
    """A sub-model that waits.

    Attributes:
        name: The unit.
        memory_gb: What its worker holds at its peak.
    """

    name: str
    memory_gb: float


def place(need: Need, types: Sequence[NodeType]) -> NodeType | None:
    """The cheapest type for its work that holds it and is free; the quicker of two that cost the same; None: wait."""
    return next((kind for kind in ranked(need, types) if kind.free > 0), None)


def ranked(need: Need, types: Sequence[NodeType]) -> list[NodeType]:
    """The types that hold it, free or not, in the order in which they are filled."""
    fitting = [kind for kind in types if kind.memory_gb >= need.memory_gb]
    return sorted(fitting, key=lambda kind: (kind.price_of_work, -kind.speed, kind.name))


def place_all(needs: Sequence[Need], types: Sequence[NodeType]) -> dict[str, str]:
    """Types by unit, for those that find one, taken in their order; no type is filled over."""
    left = {kind.name: kind for kind in types}
    placed: dict[str, str] = {}
    for need in needs:
        kind = place(need, list(left.values()))
        if kind is not None:
            placed[need.name] = kind.name
            left[kind.name] = dataclasses.replace(kind, free=kind.free - 1)
    return placed


def ask_for(needs: Sequence[Need], types: Sequence[NodeType], absent: Collection[str]) -> dict[str, str]:
    """Types by unit that nodes are to be asked for of: the cheapest that fits, of those that come when they are asked for.

    Args:
        needs: In their order.
        types: `free` of each says how many more of it there may be.
        absent: Names of those that did not come: they are asked for on behalf of what finds no other.
    """
    there = place_all(needs, [kind for kind in types if kind.name not in absent])
    rest = [need for need in needs if need.name not in there]
    return there | place_all(rest, [kind for kind in types if kind.name in absent])


def fits_nowhere(need: Need, types: Sequence[NodeType]) -> bool:
    """Whether waiting is in vain: no type of the pool would ever hold it."""
    return all(kind.memory_gb < need.memory_gb for kind in types)
