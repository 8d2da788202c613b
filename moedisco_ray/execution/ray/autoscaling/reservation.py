"""Slots that are asked for ahead of their work, so that an autoscaler brings their nodes in time.

A pending placement group is what an autoscaler hears; Ray's `request_resources` would overwrite what Ray Train asks for. A
group holds nothing until all of it can be held at once, so that runs that ask at the same time never wait for each other. It is
of the pool's tag alone, which is what brings a node: with a core or a GPU, it would keep sub-models off a machine of both pools.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from moedisco_ray.core.config import Pool
from moedisco_ray.execution.ray import ray_internals
from moedisco_ray.execution.ray.autoscaling.boot_times import BootTimes
from moedisco_ray.policies import arrival
from moedisco_ray.policies.arrival import Advice


class Reservation:
    """At most one group of a pool's slots.

    Args:
        pool: Whose.
        name: Begins what Ray shows of it.
        clock: Seconds.

    Attributes:
        workers: How many slots are asked for now.
    """

    def __init__(self, pool: Pool, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._name = name
        self._group: PlacementGroup | None = None
        self._boots = BootTimes(pool.resource, clock)
        self.workers = 0

    @property
    def boots(self) -> list[float]:
        """Seconds from asking to each node that came, whichever run asked; oldest first."""
        return self._boots.seconds

    @property
    def held(self) -> int:
        """Slots that are there and kept for us: all that are asked for, or none, less those of nodes that are about to go."""
        table = placement_group_table(self._group) if self._group is not None else {}
        if table.get("state") != "CREATED":
            return 0
        leaving = ray_internals.draining_nodes()
        return sum(node not in leaving for node in table["bundles_to_node_id"].values())

    def ask(self, workers: int) -> None:
        """Ask for so many slots in place of what was asked for before; for none, let go."""
        self.note()
        if workers == self.workers:
            return
        self.hand_over()
        self._boots.ask(workers)
        if workers:
            # No two groups of a cluster may have one name, not even where one of them is about to be removed.
            name = f"{self._name}-{uuid.uuid4().hex[:8]}"
            self._group = placement_group([{self._pool.resource: 1}] * workers, strategy="PACK", name=name)
            self.workers = workers

    def release(self) -> None:
        """Ask for nothing."""
        self.ask(0)

    def hand_over(self) -> None:
        """Ask for nothing, because the work that the slots are for is about to; `note` when it has begun: its nodes have come."""
        if self._group is not None:
            remove_placement_group(self._group)
            self._group = None
            self.workers = 0

    def note(self) -> None:
        """Keep how long the nodes took that have come since they were asked for."""
        self._boots.note()
        if not self.workers:
            self._boots.ask(0)

    def foresee(
        self, running: Sequence[float], waiting: Sequence[float], slots: int, workers: int, stretch: float = 1.0,
    ) -> Advice:
        """Do what `policies.arrival` advises, given what the work before it has left.

        Args:
            running: Seconds left of what runs there.
            waiting: The same of what waits there.
            slots: Slots there.
            workers: How many slots of this pool to ask for, when it is time.
            stretch: What losses and checkpoints add to the seconds, as a factor.
        """
        self.note()
        boot = arrival.boot_seconds(self.boots, workers)
        advice = arrival.advise(arrival.ends_in(running, waiting, slots, stretch), boot, asked=self.workers > 0)
        if advice == "ask":
            self.ask(workers)
        elif advice == "release":
            self.release()
        return advice
