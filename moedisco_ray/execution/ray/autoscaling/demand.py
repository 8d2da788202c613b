"""Slots that an autoscaler is asked for on behalf of what waits: one for each that could start.

Ray Train asks for the slots of a training once that has begun. If all began at once, so that an autoscaler heard of them, each
would be a process of the head's, and who gets the first slot would be Ray's to say, not the queue's. So only what there is room for
begins, and the rest asks here, by placement groups of one slot each. A slot that has come is let go at once: the queue sees its
node, and what it begins there takes it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Mapping

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from moedisco_ray.core.config import Pool
from moedisco_ray.execution.ray.autoscaling.boot_times import BootTimes
from moedisco_ray.policies.arrival import boot_seconds, gives_way

_GIVES_WAY_SECONDS = 600.0
"""For which a node type that did not come gives way to others, until it is asked for again; Ray's own memory of it is as long."""


class Demand:
    """What is asked for of each node type of a pool.

    Args:
        kinds: The node types, by key.
        name: Begins what Ray shows of it.
        clock: Seconds.
    """

    def __init__(self, kinds: Mapping[str, Pool], name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots = {key: _Slots(kind, f"{name}-{key}", clock) for key, kind in kinds.items()}

    @property
    def absent(self) -> Collection[str]:
        """Node types that were asked for, and did not come within twice the time that they should take."""
        return [key for key, slots in self._slots.items() if slots.absent]

    @property
    def boot(self) -> float:
        """Seconds that a node takes to come, of whichever type is the slowest."""
        return max(slots.boot for slots in self._slots.values())

    def ask(self, wanted: Mapping[str, int]) -> None:
        """Ask for so many slots of each node type in place of what was asked for before; of one that is left out, for none."""
        for key, slots in self._slots.items():
            slots.ask(wanted.get(key, 0))


class _Slots:
    """Of one node type."""

    def __init__(self, kind: Pool, name: str, clock: Callable[[], float]) -> None:
        self._kind = kind
        self._name = name
        self._clock = clock
        self._boots = BootTimes(kind.resource, clock)
        self._groups: list[PlacementGroup] = []
        self._since: float | None = None
        self._absent_until = 0.0

    @property
    def absent(self) -> bool:
        return self._clock() < self._absent_until

    @property
    def boot(self) -> float:
        return boot_seconds(self._boots.seconds)

    def ask(self, count: int) -> None:
        now = self._clock()
        if self._boots.note() or self._since is None:
            self._since = now
        if not count:
            self._since = None
        elif gives_way(now - self._since, self.boot):
            self._since, self._absent_until = None, now + _GIVES_WAY_SECONDS
        self._boots.ask(count)
        self._let_go_of_what_came()
        while len(self._groups) > count:
            remove_placement_group(self._groups.pop())
        while len(self._groups) < count:
            # No two groups of a cluster may have one name, not even where one of them is about to be removed.
            self._groups.append(placement_group([{self._kind.resource: 1}], name=f"{self._name}-{uuid.uuid4().hex[:8]}"))

    def _let_go_of_what_came(self) -> None:
        if not self._groups:
            return
        table = placement_group_table()
        for group in [group for group in self._groups if table[group.id.hex()]["state"] == "CREATED"]:
            remove_placement_group(group)
            self._groups.remove(group)
