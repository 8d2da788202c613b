"""Requests an autoscaler's slots for waiting trainings: one slot for each training that could start.

Ray Train requests a training's slots once the training has begun. If all trainings began at once, an autoscaler would
see them, but each would be a process on the head node, and Ray instead of the queue would decide which of them gets the
first slot. So trainings begin only while slots are free, and slots for the others are requested here, by placement
groups of one slot each. When a group gets its slot, it is removed, and the queue begins a training in that slot.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import Pool
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.autoscaling.boot_times import BootTimes
from moedisco_ray.execution.ray.nodes_aside import NodesAside
from moedisco_ray.policies.arrival import boot_seconds, gives_way
from moedisco_ray.policies.placement import Need, ask_for

ABSENT_SECONDS = 600.0
"""Seconds for which a node type is not requested again after its nodes did not arrive. Ray itself remembers this for as
long."""


class Demand:
    """The slots requested of each node type of a pool.

    Args:
        node_types: The node types, by key.
        name: Prefix of the placement groups' names.
        clock: Returns the current time in seconds.
        aside: Nodes whose slots do not count; None if none is known yet.
    """

    def __init__(
        self,
        node_types: Mapping[str, Pool],
        name: str,
        clock: Callable[[], float] = time.monotonic,
        aside: NodesAside | None = None,
    ) -> None:
        self._pools = node_types
        aside = aside or NodesAside()
        self._requests = {
            key: _Requests(node_type, f"{name}-{key}", clock, aside) for key, node_type in node_types.items()
        }

    @property
    def absent(self) -> Collection[str]:
        """Keys of the node types whose requested nodes did not arrive within twice the expected time."""
        return [key for key, requests in self._requests.items() if requests.absent]

    @property
    def boot_seconds(self) -> float:
        """Expected seconds from request to arrival of a node, for the slowest node type."""
        return max(requests.boot_seconds for requests in self._requests.values())

    def request_for(self, order: Sequence[Need], placement: Placement, taken: Counter[str]) -> None:
        """Request slots for waiting trainings.

        If nodes of a type do not arrive, slots of the next type that fits are requested.

        Args:
            order: Needs of the waiting trainings, in the order in which they start.
            placement: The pool.
            taken: Number of started trainings, which already hold or await a slot, by node type.
        """
        types = placement.types({key: session.max_workers(pool) - taken[key] for key, pool in self._pools.items()})
        found = ask_for(order, types, self.absent)
        left = max(0, session.max_workers(placement.pool) - taken.total())
        self.request(Counter([found[need.name] for need in order if need.name in found][:left]))

    def hand_over(self) -> None:
        """Release the slots that requests have got, just before trainings request them; see `session.freeing`."""
        for requests in self._requests.values():
            requests.hand_over()

    def request(self, slots: Mapping[str, int]) -> None:
        """Set the number of requested slots of each node type; it is 0 for a node type without an entry."""
        for key, requests in self._requests.items():
            requests.set(slots.get(key, 0))


class _Requests:
    def __init__(self, node_type: Pool, name: str, clock: Callable[[], float], aside: NodesAside) -> None:
        self._aside = aside
        self._node_type = node_type
        self._name = name
        self._clock = clock
        self._boots = BootTimes(node_type.resource, clock)
        self._groups: list[PlacementGroup] = []
        self._since: float | None = None
        self._absent_until = 0.0

    @property
    def absent(self) -> bool:
        return self._clock() < self._absent_until

    @property
    def boot_seconds(self) -> float:
        return boot_seconds(self._boots.seconds)

    def set(self, count: int) -> None:
        now = self._clock()
        if self._boots.record() or self._since is None:
            self._since = now
        if not count:
            self._since = None
        elif gives_way(now - self._since, self.boot_seconds):
            self._since, self._absent_until = None, now + ABSENT_SECONDS
        self._boots.request(count)
        self._remove(self._fulfilled())
        while len(self._groups) > count:
            remove_placement_group(self._groups.pop())
        while len(self._groups) < count:
            # Names are unique in a Ray cluster, even while a group is being removed.
            self._groups.append(
                placement_group(
                    [{self._node_type.resource: self._node_type.slots}],
                    name=f"{self._name}-{uuid.uuid4().hex[:8]}",
                    bundle_label_selector=[dict(self._aside.selector(self._node_type))],
                )
            )

    def hand_over(self) -> None:
        if fulfilled := self._fulfilled():
            with session.freeing(self._node_type.resource, len(fulfilled)):
                self._remove(fulfilled)

    def _fulfilled(self) -> list[PlacementGroup]:
        table = placement_group_table() if self._groups else {}
        return [group for group in self._groups if table[group.id.hex()]["state"] == "CREATED"]

    def _remove(self, groups: Sequence[PlacementGroup]) -> None:
        for group in groups:
            remove_placement_group(group)
            self._groups.remove(group)
