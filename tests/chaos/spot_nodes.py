"""A Ray cluster of single-slot nodes on this machine, which can be drained and lose their power."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import ray
import yaml
from ray._private import state
from ray._private.node import Node
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from waiting import until

from moedisco_ray.core.config import RunConfig
from moedisco_ray.execution.ray.autoscaling.draining import drain
from moedisco_ray.execution.ray.session import NO_DASHBOARD

_MEMORY = 80_000_000
_PATIENCE = 30.0
_RECONNECT_SECONDS = 5
# A node that answers no more is lost after 1.5 s instead of 15, and a head after 5 s instead of 60: on one machine, a
# refused connection is no hiccup of a network.
_SYSTEM = {
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
    "gcs_rpc_server_reconnect_timeout_s": _RECONNECT_SECONDS,
}
_OF_A_NODE = ("IDLE", "DashboardAgent", "RuntimeEnvAgent")
_OF_A_CLUSTER = ("TrainStateActor", "_AutoscalingCoordinatorActor", "_StatsActor", "_UsageCollectionActor")
"""Ray keeps one of each for the lifetime of a Ray cluster, whatever nodes come and go."""


class SpotNodes:
    """The cluster; its head has no room for work."""

    def __init__(self) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": _MEMORY,
                "_system_config": _SYSTEM,
            },
        )
        self._nodes: dict[str, tuple[str, Node]] = {}
        self._going: set[str] = set()
        self._gone: list[psutil.Process] = []
        ray.init(
            address=self._cluster.address,
            runtime_env=dict(NO_DASHBOARD),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return str(self._cluster.address)

    def add(self, resource: str, slots: int = 1) -> str:
        """Start a node with room for one worker, or more; returns its id."""
        node = self._cluster.add_node(num_cpus=slots, resources={resource: slots}, object_store_memory=_MEMORY)
        self._nodes[node.node_id] = (resource, node)
        return str(node.node_id)

    def of(self, resource: str) -> list[str]:
        """The nodes that offer a resource."""
        return [node_id for node_id, (offered, _) in self._nodes.items() if offered == resource]

    def kill(self, node_id: str) -> None:
        """SIGKILL to the node's raylet; its workers find out for themselves."""
        _, node = self._nodes.pop(node_id)
        self._gone += _children(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_head(self) -> None:
        """Kill the processes of the head with SIGKILL; the other nodes lose their cluster, and end some time later."""
        ray.shutdown()
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)

    @contextlib.contextmanager
    def driver(self, run: RunConfig, home: Path) -> Iterator[subprocess.Popen[bytes]]:
        """The driver of a run, a process of its own that uses this cluster; its output goes to HOME/output.log."""
        path = home / "run.yaml"
        path.write_text(yaml.safe_dump(run.model_dump(mode="json")), encoding="utf-8")
        with (home / "output.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "moedisco_ray", "run", str(path)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled"},
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def notify(self, node_id: str, seconds: float) -> None:
        """Announce that the node will go; one that has nothing to do ends by itself."""
        self._going.add(node_id)
        self._gone += _children(self._nodes[node_id][1])
        drain(self._cluster.gcs_address, node_id, int((time.time() + seconds) * 1000), "chaos")

    def reset(self, wanted: Mapping[str, int]) -> None:
        """Have this number of nodes of each resource, none about to go."""
        for node_id in self._going & self._nodes.keys():
            self.kill(node_id)
        for resource, count in wanted.items():
            there = self.of(resource)
            for node_id in there[count:]:
                self.kill(node_id)
            for _ in range(count - len(there)):
                self.add(resource)
        until(
            lambda: (
                {node["NodeID"] for node in ray.nodes() if node["Alive"] and wanted.keys() & node["Resources"]}
                == {*self._nodes}
            )
        )

    def check_nothing_is_left(self) -> None:
        """A run that has ended holds no placement group, actor or process; Ray may take its time to end them."""
        deadline = time.monotonic() + _PATIENCE
        while (left := self._left_over()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left, left

    def shut_down(self) -> None:
        """End the cluster."""
        ray.shutdown()
        self._cluster.shutdown()

    def _left_over(self) -> list[str]:
        groups = [
            f"placement group {key}: {group['state']}"
            for key, group in placement_group_table().items()
            if group["state"] != "REMOVED"
        ]
        actors = [
            f"actor {actor['ActorClassName']}: {actor['State']}"
            for actor in state.actors().values()
            if actor["State"] != "DEAD" and actor["ActorClassName"] not in _OF_A_CLUSTER
        ]
        orphans = [f"process of a node that is gone: {process.pid}" for process in self._gone if process.is_running()]
        return [*groups, *actors, *orphans, *self._busy()]

    def _busy(self) -> list[str]:
        titles = [_title(child) for _, node in self._nodes.values() for child in _children(node)]
        workers = [title.removeprefix("ray::") for title in titles if title.startswith("ray::")]
        return [worker for worker in workers if not worker.startswith((*_OF_A_NODE, *_OF_A_CLUSTER))]


def _children(node: Node) -> list[psutil.Process]:
    try:
        return psutil.Process(node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextlib.contextmanager
def spot_nodes() -> Iterator[SpotNodes]:
    """The cluster for the length of a block; this process is connected to it."""
    ray.shutdown()  # the shared cluster of other tests, if it is connected
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        nodes = SpotNodes()
        try:
            yield nodes
        finally:
            nodes.shut_down()
