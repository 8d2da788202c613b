"""Nodes that a run leaves out, because torch cannot compute on a GPU there."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

import ray

from moedisco_ray.core.config import Pool
from moedisco_ray.core.errors import CardError, UserError
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.execution.ray import session

_NODE_ID = "ray.io/node-id"
"""Label by which Ray selects nodes; Ray sets it on each node."""


MOST_IN_A_ROW = 5
"""Nodes that are put aside in a row, with no GPU found to work in between, until an autoscaler is not waited for: its
image or its driver is wrong, and each further node would cost money and fail too."""


class NodesAside:
    """The nodes that work of pools with GPUs avoids until the run ends. Several threads may use this object.

    Work of a pool without GPUs may still run on these nodes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._errors: dict[str, UserError] = {}
        self._in_a_row = 0

    def put(self, error: CardError, emit: Emit) -> None:
        """Put the nodes of an error, and of the errors that were found together with it, aside.

        Args:
            error: The failed check of a GPU.
            emit: Receives one `warning` for each node that was not aside before.
        """
        for each in (error, *error.others):
            if not isinstance(each, CardError):
                continue
            with self._lock:
                known = each.node_id in self._errors
                self._errors.setdefault(each.node_id, each)
                self._in_a_row += not known
            if not known:
                emit(Event("warning", data={"message": f"{each}; the run continues without this node"}))

    def found_working(self) -> None:
        """Note that torch can use a GPU of another node."""
        with self._lock:
            self._in_a_row = 0

    def of(self, pool: Pool) -> frozenset[str]:
        """Ids of the nodes that a pool's work avoids."""
        with self._lock:
            return frozenset(self._errors) if pool.gpu else frozenset()

    def selector(self, pool: Pool, others: Collection[str] = ()) -> Mapping[str, str]:
        """Labels by which Ray keeps a pool's work away from these nodes, and from others."""
        nodes = sorted({*self.of(pool), *others})
        return {_NODE_ID: f"!in({','.join(nodes)})"} if nodes else {}

    def check(self, pool: Pool, workers: int = 1) -> None:
        """Check that workers of a pool can run on other nodes.

        An autoscaler may bring other nodes. Without one, work would wait for a person who notices.

        Raises:
            CardError: The other nodes have too few slots, and no autoscaler brings more; or it brings only nodes that
                are put aside, too.
        """
        aside = self.of(pool)
        if not aside:
            return
        if session.autoscales():
            with self._lock:
                if self._in_a_row >= MOST_IN_A_ROW:
                    raise next(reversed(self._errors.values()))
            return
        offering = [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] in aside and any(node["Resources"].get(tag) for tag in pool.tags)
        ]
        if offering and sum(session.slots(node_type, aside) for node_type in pool.node_types) < workers:
            with self._lock:
                raise self._errors[offering[0]]
