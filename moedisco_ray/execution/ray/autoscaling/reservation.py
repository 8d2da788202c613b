"""Slots that are requested before their work begins, so that an autoscaler brings their nodes in time.

An autoscaler sees a pending placement group; Ray's `request_resources` would overwrite what Ray Train requests. A group
holds nothing until all of it can be held at once, so that runs that request slots at the same time never block each
other. It requests only the pool's tag, which suffices to bring a node: a CPU or GPU in the request would block
sub-models on a machine that belongs to both pools.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from moedisco_ray.core.config import Pool
from moedisco_ray.execution.ray import ray_internals, session
from moedisco_ray.execution.ray.autoscaling.boot_times import BootTimes
from moedisco_ray.execution.ray.nodes_aside import NodesAside
from moedisco_ray.policies import arrival
from moedisco_ray.policies.arrival import Advice


class Reservation:
    """Requests slots of a pool ahead of their use, by at most one placement group.

    Args:
        name: Prefix of the placement groups' names.
        clock: Returns the current time in seconds.
        aside: Nodes whose slots do not count; None if none is known yet.

    Attributes:
        workers: Number of slots requested now.
    """

    def __init__(
        self, pool: Pool, name: str, clock: Callable[[], float] = time.monotonic, aside: NodesAside | None = None
    ) -> None:
        self._pool = pool
        self._aside = aside or NodesAside()
        self._name = name
        self._group: PlacementGroup | None = None
        self._boots = BootTimes(pool.resource, clock)
        self.workers = 0

    @property
    def boot_times(self) -> list[float]:
        """Seconds from request to arrival of earlier nodes, over all runs, oldest first."""
        return self._boots.seconds

    @property
    def held(self) -> int:
        """Number of held slots, without those on draining nodes and nodes put aside; 0 until all are held."""
        table = placement_group_table(self._group) if self._group is not None else {}
        if table.get("state") != "CREATED":
            return 0
        avoided = {*ray_internals.draining_nodes(), *self._aside.of(self._pool)}
        return sum(node not in avoided for node in table["bundles_to_node_id"].values())

    def request(self, workers: int) -> None:
        """Set the number of requested slots; 0 removes the request."""
        self.record()
        if workers == self.workers:
            return
        self.hand_over()
        self._boots.request(workers)
        if workers:
            # Names are unique in a Ray cluster, even while a group is being removed.
            name = f"{self._name}-{uuid.uuid4().hex[:8]}"
            self._group = placement_group(
                [{self._pool.resource: 1}] * workers,
                strategy="PACK",
                name=name,
                bundle_label_selector=[dict(self._aside.selector(self._pool))] * workers,
            )
            self.workers = workers

    def hand_over(self) -> None:
        """Release the requested slots just before the work requests its own slots.

        Call `record` once the work has begun.

        The slots are released first, and requested by the work only when the autoscaler knows that they are free: it
        counts what is held as taken, so a request next to a held reservation would be for as many nodes again. Nodes
        stay without a request until their idle timeout, which is longer than a start.
        """
        if self._group is None:
            return
        with session.freeing(self._pool.resource, self.held):
            remove_placement_group(self._group)
        self._group = None
        self.workers = 0

    def record(self) -> None:
        """Store the boot times of nodes that have arrived since the last call."""
        self._boots.record()
        if not self.workers:
            self._boots.request(0)

    def prepare(
        self, running: Sequence[float], waiting: Sequence[float], slots: int, workers: int, stretch: float = 1.0
    ) -> Advice:
        """Request or release slots, as `policies.arrival` advises from the time left until the slots are needed.

        Args:
            running: Seconds left of each running training.
            waiting: Seconds left of each waiting training.
            slots: Number of slots for these trainings.
            workers: Number of this pool's slots to request.
            stretch: Factor by which lost nodes and checkpoints are expected to lengthen these seconds.
        """
        self.record()
        boot = arrival.boot_seconds(self.boot_times, workers)
        advice = arrival.advise(arrival.ends_in(running, waiting, slots, stretch), boot, asked=self.workers > 0)
        if advice == "ask":
            self.request(workers)
        elif advice == "release":
            self.request(0)
        return advice
