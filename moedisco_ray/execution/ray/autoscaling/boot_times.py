"""How long nodes of a tag took to come, kept by the cluster for the runs that follow."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import ray

from moedisco_ray.execution.ray import ray_internals

_NAMESPACE = "moedisco"
_KEPT = 50
"""Boot times of a tag that the cluster keeps."""


class BootTimes:
    """Boot times of the nodes that offer a tag.

    Args:
        tag: A custom resource.
        clock: Seconds.
    """

    def __init__(self, tag: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._tag = tag
        self._clock = clock
        self._known: set[str] = set()
        self._asked: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """From asking to each node that came, whichever run asked; oldest first."""
        kept = ray_internals.kv_get(self._key, _NAMESPACE)
        return [] if kept is None else list(json.loads(kept))

    def ask(self, slots: int) -> None:
        """So many are asked for from now on, those that were before among them."""
        if not self._asked:
            self._known = self._nodes()
        waiting = self._asked[-slots:] if slots else []
        self._asked = [*waiting, *[self._clock()] * (slots - len(waiting))]

    def note(self) -> int:
        """Keep how long nodes took that have come since they were asked for; returns how many have."""
        if not self._asked:
            return 0
        come = self._nodes() - self._known
        self._known |= come
        if come:
            now = self._clock()
            # The slot that waits longest gets the first node.
            took = [now - self._asked[min(place, len(self._asked) - 1)] for place in range(len(come))]
            ray_internals.kv_put(self._key, json.dumps([*self.seconds, *took][-_KEPT:]), _NAMESPACE)
        return len(come)

    @property
    def _key(self) -> str:
        return f"boots/{self._tag}"

    def _nodes(self) -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(self._tag)}
