"""How long nodes with a tag took to boot, stored in the Ray cluster for the runs that follow."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import ray

from moedisco_ray.execution.ray import ray_internals

_NAMESPACE = "moedisco"
_MAX_KEPT = 50
"""Number of the newest boot times that the Ray cluster keeps for each tag."""


class BootTimes:
    """Boot times of the nodes that offer a tag.

    Args:
        tag: A custom resource.
    """

    def __init__(self, tag: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._tag = tag
        self._clock = clock
        self._known: set[str] = set()
        self._requested_at: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """Seconds from request to arrival of earlier nodes, over all runs, oldest first."""
        kept = ray_internals.kv_get(self._key, _NAMESPACE)
        return [] if kept is None else list(json.loads(kept))

    def request(self, slots: int) -> None:
        """Set the number of slots that are requested now.

        Slots that were already requested keep the time of their request.
        """
        if not self._requested_at:
            self._known = self._nodes()
        waiting = self._requested_at[-slots:] if slots else []
        self._requested_at = [*waiting, *[self._clock()] * (slots - len(waiting))]

    def record(self) -> int:
        """Store the boot times of nodes that have arrived since the last call; return the number of these nodes."""
        if not self._requested_at:
            return 0
        new = self._nodes() - self._known
        self._known |= new
        if new:
            now = self._clock()
            # Count the first node for the oldest request.
            times = [now - self._requested_at[min(place, len(self._requested_at) - 1)] for place in range(len(new))]
            ray_internals.kv_put(self._key, json.dumps([*self.seconds, *times][-_MAX_KEPT:]), _NAMESPACE)
        return len(new)

    @property
    def _key(self) -> str:
        return f"boots/{self._tag}"

    def _nodes(self) -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(self._tag)}
