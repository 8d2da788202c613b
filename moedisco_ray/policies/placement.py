"""Placement of sub-models on the node types of a mixed pool: the cheapest type that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence


@dataclasses.dataclass(frozen=True)
class NodeType:
    """A node type of a pool.

    Attributes:
        memory_gb: Memory of a worker (GiB).
        price_per_hour: Dollars per worker-hour.
        speed: Relative training speed.
        free: Number of workers that could start now.
        owner: The data owner whose nodes these are. The owner's sub-models run only on these nodes, and no other
            sub-models run on them.
    """

    name: str
    memory_gb: float
    price_per_hour: float
    speed: float
    free: int
    owner: str | None = None

    @property
    def price_of_work(self) -> float:
        """Dollars for an hour of work at speed 1; a fast machine with a high hourly price may be cheaper."""
        return self.price_per_hour / self.speed


@dataclasses.dataclass(frozen=True)
class Need:
    """A sub-model that waits for a worker.

    Attributes:
        memory_gb: Peak memory of its worker (GiB).
        owner: The data owner whose text it trains on; None: text without an owner.
    """

    name: str
    memory_gb: float
    owner: str | None = None

    def fits(self, kind: NodeType) -> bool:
        """Whether a node type has enough memory and the same owner."""
        return kind.memory_gb >= self.memory_gb and kind.owner == self.owner


def place(need: Need, types: Sequence[NodeType]) -> NodeType | None:
    """The free node type with enough memory that does the work at least cost, the fastest of equals; None if none."""
    return next((kind for kind in ranked(need, types) if kind.free > 0), None)


def ranked(need: Need, types: Sequence[NodeType]) -> list[NodeType]:
    """All node types that fit, free or not, best first."""
    fitting = [kind for kind in types if need.fits(kind)]
    return sorted(fitting, key=lambda kind: (kind.price_of_work, -kind.speed, kind.name))


def place_all(needs: Sequence[Need], types: Sequence[NodeType]) -> dict[str, str]:
    """Place units in order; units for which no suitable node type is free are left out."""
    left = {kind.name: kind for kind in types}
    placed: dict[str, str] = {}
    for need in needs:
        kind = place(need, list(left.values()))
        if kind is not None:
            placed[need.name] = kind.name
            left[kind.name] = dataclasses.replace(kind, free=kind.free - 1)
    return placed


def ask_for(needs: Sequence[Need], types: Sequence[NodeType], absent: Collection[str]) -> dict[str, str]:
    """The node type to request for each unit: the cheapest with enough memory among those that arrive on request.

    Args:
        needs: Units, in order.
        types: Node types; `free` is the number that could still be added.
        absent: Names of node types that did not arrive; they are requested only for units that fit no other.
    """
    there = place_all(needs, [kind for kind in types if kind.name not in absent])
    rest = [need for need in needs if need.name not in there]
    return there | place_all(rest, [kind for kind in types if kind.name in absent])


def fits_nowhere(need: Need, types: Sequence[NodeType]) -> bool:
    """Whether the sub-model fits no node type of the pool."""
    return not any(map(need.fits, types))
