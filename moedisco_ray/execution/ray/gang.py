"""Decide the number of workers of a gang: fewer after a lost node, more when more slots are free.

A waiting gang holds no slots, and starts with the largest size that fits. If a pool has room for only one of two runs,
one of them trains and the other waits. To change its size, a gang saves a checkpoint and ends, and a gang of the new
size continues from the checkpoint. The global batch stays the same, and with it the loss, up to rounding.

Ray Train 2.60 can change the size of a running gang (`ScalingConfig(num_workers=(min, max))`). This is not used,
because Ray Train

- accepts any number of workers, even one that does not divide the batch;
- counts slots of draining nodes and slots that others hold, up to 20 s late, and then waits 60 s for workers that
  cannot start;
- ends the workers of a growing gang without a checkpoint, even if little work is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from moedisco_ray.backend import Placement
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.autoscaling.reservation import Reservation
from moedisco_ray.execution.ray.nodes_aside import NodesAside
from moedisco_ray.policies.arrival import boot_seconds
from moedisco_ray.policies.gang import Sizes, worth_growing


class GangSize:
    """Decides the number of workers of a gang, and requests nodes for them.

    Args:
        placement: Pool of the workers.
        sizes: Allowed numbers of workers.
        reservation: Requests nodes for the gang, and holds slots that an earlier stage has requested for it.
        clock: Returns the current time in seconds.
        aside: The run's nodes on which torch cannot use a GPU; None if none is known yet.

    Attributes:
        aside: Nodes on which no worker starts.
    """

    def __init__(
        self,
        placement: Placement,
        sizes: Sizes,
        reservation: Reservation,
        clock: Callable[[], float] = time.monotonic,
        aside: NodesAside | None = None,
    ) -> None:
        self.aside = aside or NodesAside()
        self._placement = placement
        self._sizes = sizes
        self._reservation = reservation
        self._clock = clock
        self._autoscales = session.autoscales()
        self._began = clock()
        self._requested_at: float | None = None
        self._next: int | None = None

    def to_start(self) -> int | None:
        """Number of workers to start with; None if not even the smallest gang fits yet (then nodes are requested)."""
        # A gang that ended in order to grow starts with the larger size, even if Ray does not yet report its old slots
        # as free.
        found = self._next or self._sizes.on(self._free_slots)
        self._next = None
        if found is not None:
            self.request(0)
        elif self._clock() - self._began > session.VIEW_SECONDS:  # Ray has noticed freed slots by then
            self.request(self._size_to_request())
        return found

    def larger(self, workers: int, seconds_left: float, restart_seconds: float) -> int | None:
        """A larger number of workers for which a restart saves time now; None if there is none.

        If more workers would save time but lack free slots, nodes for them are requested.

        Args:
            workers: Current number of workers.
            seconds_left: Remaining seconds with the current workers.
            restart_seconds: Seconds that a restart takes, from the stop with a checkpoint to the next step.
        """
        possible = self._sizes.on(workers + self._free_slots)
        if possible is not None and worth_growing(workers, possible, seconds_left, restart_seconds):
            self._next = possible
            self.request(0)
            return possible
        # The gang trains while the nodes boot: the nodes can shorten only the work that is left when they come.
        booting = self._boot_seconds if self._requested_at is None else 0.0
        wanted = self._size_to_request()
        grow = worth_growing(workers, wanted, seconds_left - booting, restart_seconds)
        self.request(wanted - workers if grow else 0)
        return None

    def forget_growth(self) -> None:
        """Cancel planned growth: the gang ended for another reason, and its next start uses the slots that are free."""
        self._next = None

    def request(self, workers: int) -> None:
        """Request nodes for a number of additional workers; this replaces the previous request."""
        if not workers:
            self._requested_at = None
        elif self._requested_at is None:
            self._requested_at = self._clock()
        if self._autoscales:
            self._reservation.request(workers)

    @property
    def _free_slots(self) -> int:
        # The slots that are reserved for the gang are free for it.
        aside = self.aside.of(self._placement.pool)
        return session.free_workers(self._placement.bundle, aside) + self._reservation.held

    @property
    def _boot_seconds(self) -> float:
        return boot_seconds(self._reservation.boot_times) if self._autoscales else math.inf

    def _size_to_request(self) -> int:
        """The largest size; a smaller one if nodes for more did not arrive within twice the expected time."""
        patience = 2 * self._boot_seconds
        waited = 0.0 if self._requested_at is None else self._clock() - self._requested_at
        most = session.max_slots(self._placement.pool)
        return self._sizes.asked(most, int(waited // patience) if math.isfinite(patience) else 0)
