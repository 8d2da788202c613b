"""Pools of the cluster (nodes with a common tag), read from the Ray dashboard.

Totals come from Ray's state API. Usage comes from the dashboard's summary of nodes, the only source that works with
both versions of Ray's autoscaler. The summary gives usage as text, about five seconds old.
"""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

from service.errors import RayUnavailable
from service.ray_side.answers import GroupList, NodeList, RayNode, Summary, read_as
from service.ray_side.dashboard import Dashboard
from service.schemas import PoolList, PoolNode, PoolStatus

_RAYS_OWN = re.compile(
    r"CPU|GPU|TPU|memory|object_store_memory|node:.*|accelerator_type:.*|.*_group_(\d+_)?[0-9a-f]{36}"
)
_USE = re.compile(
    r"\s*(?P<used>[\d.]+)/[\d.]+ (?P<name>\S+)( \((?P<used_of_reserved>[\d.]+) used of (?P<reserved>[\d.]+) reserved)?"
)
_ALL = {"detail": "1", "limit": "10000"}
_DAY = 24 * 3600.0
_FRESH_SECONDS = 1.0
"""Maximum age of an answer that callers share, in seconds."""


class RayPools:
    """Pools of a Ray cluster, through the REST API of its dashboard.

    Args:
        clock: Returns seconds since the epoch.
    """

    def __init__(self, dashboard: Dashboard, clock: Callable[[], float] = time.time) -> None:
        self._dashboard = dashboard
        self._clock = clock
        self._reading = threading.Lock()
        self._read = float("-inf")
        self._shared = PoolList(connected=False, items=[])

    def read(self, resources: Collection[str] | None = None) -> PoolList:
        """Read all pools.

        Never raises: `connected` is false if Ray does not answer. `price_per_hour` is null because Ray does not know
        it.

        Args:
            resources: Pools to include even if no node offers them. None includes no such pools and shares an answer of
                the last second. While Ray takes its time, one caller waits, and the others get the answer before.
        """
        if resources is not None:
            return self._pools(resources)
        if self._reading.acquire(blocking=False):
            try:
                if time.monotonic() - self._read >= _FRESH_SECONDS:
                    self._shared = self._pools(())
                    self._read = time.monotonic()
            finally:
                self._reading.release()
        return self._shared

    def _pools(self, resources: Collection[str]) -> PoolList:
        try:
            nodes = read_as(NodeList, self._dashboard.get("/api/v0/nodes", _ALL)).items
            used, pending = self._used(), self._pending()
        except RayUnavailable:
            return PoolList(connected=False, items=[])
        offered = {name for node in nodes for name in node.resources_total if not _RAYS_OWN.fullmatch(name)}
        return PoolList(
            connected=True,
            items=[
                _pool(name, nodes, used.get(name, 0.0), pending.get(name, 0.0), since=self._clock() - _DAY)
                for name in sorted(offered | set(resources))
            ],
        )

    def grows(self) -> bool:
        """Whether an autoscaler may add nodes: only then does Ray report node types. False if Ray does not answer."""
        try:
            return any(node.type_name for node in self._summary().nodes)
        except RayUnavailable:
            return False

    def _used(self) -> Mapping[str, float]:
        used: dict[str, float] = defaultdict(float)
        for text in self._summary().uses.values():
            for line in text.splitlines():
                if match := _USE.match(line):
                    # Slots that a placement group reserves are taken, although Ray counts them only once a worker uses
                    # them.
                    idle = float(match["reserved"] or 0) - float(match["used_of_reserved"] or 0)
                    used[match["name"]] += float(match["used"]) + idle
        return used

    def _pending(self) -> Mapping[str, float]:
        """Amount of each resource that placement groups wait for."""
        pending: dict[str, float] = defaultdict(float)
        for group in read_as(GroupList, self._dashboard.get("/api/v0/placement_groups", _ALL)).items:
            for bundle in group.waiting:
                for name, count in bundle.unit_resources.items():
                    pending[name] += count
        return pending

    def _summary(self) -> Summary:
        return read_as(Summary, self._dashboard.get("/nodes", {"view": "summary", "nocache": "1"}))


def _pool(resource: str, nodes: list[RayNode], used: float, pending: float, *, since: float) -> PoolStatus:
    pool = [node for node in nodes if node.resources_total.get(resource)]
    alive = [node for node in pool if node.alive]
    lost = [node for node in pool if node.lost_since(since)]
    slots = sum(node.resources_total[resource] for node in alive)
    return PoolStatus(
        resource=resource,
        slots=slots,
        free=max(0.0, slots - used),
        gpus=sum(node.resources_total.get("GPU", 0.0) for node in alive),
        nodes=[_node(node) for node in (*alive, *lost)],
        price_per_hour=None,
        lost=len(lost),
        pending=round(pending),
    )


def _node(node: RayNode) -> PoolNode:
    resources = {name: count for name, count in node.resources_total.items() if not name.startswith("node:")}
    return PoolNode(id=node.node_id, address=node.node_ip, alive=node.alive, resources=resources, labels=node.labels)
