"""All private or undocumented API of Ray that the package uses, with the reason why the public API is not enough.

Every entry was checked with the Ray version in `CHECKED_WITH`. A test fails with any other version, or if another file
imports a private module of Ray. Review this module before you change the Ray version in pyproject.toml.

The entries of Ray Train and Ray Data are in `ray_train_internals` and `ray_data_internals`: importing Ray Train takes
another second and 120 MB, which the program that drains a node in its last seconds, and the autoscaler on a small head
node, should not spend.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

from ray._common.network_utils import parse_address
from ray._private import ray_constants, services, state

# Ray's only command for draining, `ray drain-node`, is hidden from `ray --help`, accepts unknown nodes, and lists no
# draining ones.
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Ray's stub leaves it out
from ray.autoscaler._private.providers import _get_node_provider_cls

# The error of Ray's AWS launcher, and the tags of what it launches.
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_LAUNCH_REQUEST, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

# The record of node types that a cloud refuses is internal to the autoscaler.
from ray.autoscaler.v2 import autoscaler
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor

# `GcsClient.drain_node` takes the reason as a number.
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

# Values of the states of a requested instance, in the events that a `CloudResourceMonitor` receives.
from ray.core.generated.instance_manager_pb2 import Instance
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.job_config import JobConfig

__all__ = [
    "CHECKED_WITH",
    "DRAIN_NODE_REASON_PREEMPTION",
    "NODE_KIND_WORKER",
    "TAG_RAY_LAUNCH_REQUEST",
    "TAG_RAY_NODE_KIND",
    "TAG_RAY_USER_NODE_TYPE",
    "CloudResourceMonitor",
    "GcsClient",
    "Instance",
    "JobWithoutFolders",
    "NodeLaunchException",
    "available_resources_per_node",
    "cluster_address",
    "draining_nodes",
    "kv_get",
    "kv_put",
    "kv_put_from_head",
    "max_cluster_resources",
    "node_provider_class",
    "on_loopback",
    "set_cloud_resource_monitor",
]

CHECKED_WITH = "2.60"
"""Ray version with which every entry of this module was checked."""
_KV_TIMEOUT_S = 5


def available_resources_per_node() -> dict[str, dict[str, float]]:
    """Free resources by node id; the public `ray.available_resources` gives only their sum over the nodes."""
    found: dict[str, dict[str, float]] = state.available_resources_per_node()
    return found


def draining_nodes() -> Mapping[str, int]:
    """Deadline of each draining node (ms since the epoch), by node id; the public `ray.nodes` does not show it."""
    found: dict[str, int] = state.state.get_draining_nodes()
    return found


def max_cluster_resources() -> Mapping[str, int] | None:
    """Maximum resources that the autoscaler may bring; None if it states no maximum.

    The public API knows only present nodes.
    """
    found: dict[str, int] | None = state.state.get_max_resources_from_cluster_config()
    return found


class JobWithoutFolders(JobConfig):
    """A job whose workers import no modules from the driver's working directory, which may hold other people's files.

    `ray.init` puts the driver's working directory, and the folder of its script, before all others in the search path
    of the workers. No public option prevents this, except a `working_dir` of the runtime environment, which would
    become the working directory of the workers.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        """Whether the workers have a `working_dir`; Ray asks this only to leave out the driver's folders."""
        return True


def cluster_address(address: str) -> tuple[str, tuple[str, str]]:
    """Resolve a Ray cluster's address without connecting; `ray.init` would wait for a cluster that does not respond.

    Returns:
        The address as `HOST:PORT`, and its host and port.

    Raises:
        ValueError: The text is no address of a Ray cluster.
    """
    found = services.canonicalize_bootstrap_address(address)
    return found, parse_address(found)


def kv_get(key: str, namespace: str) -> bytes | None:
    """A value from the Ray cluster's key-value store; the public way, a detached actor, would occupy a process."""
    found: bytes | None = _internal_kv_get(key, namespace=namespace)
    return found


def kv_put(key: str, value: str, namespace: str) -> None:
    """Store a value in the Ray cluster's key-value store, which lasts as long as the Ray cluster; see `kv_get`."""
    _internal_kv_put(key, value, namespace=namespace)


def kv_put_from_head(key: str, value: str, namespace: str) -> None:
    """Store a value from a process on the head node that is not a driver, such as the autoscaler; see `kv_put`.

    Raises:
        ConnectionError: No Ray cluster runs on this machine.
        RpcError: The Ray cluster does not respond.
    """
    address = services.canonicalize_bootstrap_address_or_die("auto")
    GcsClient(address=address).internal_kv_put(
        key.encode(), value.encode(), overwrite=True, namespace=namespace.encode(), timeout=_KV_TIMEOUT_S
    )


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Let a Ray cluster that starts in the block listen on 127.0.0.1 alone, as Ray does on macOS and Windows.

    Ray replaces 127.0.0.1 by another address of the machine where a user asks for it (`_node_ip_address`,
    `--node-ip-address`), and then listens on all interfaces. The processes that it starts keep the variable.
    """
    variable, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    given = os.environ.get(variable)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[variable] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if given is None:
            del os.environ[variable]
        else:
            os.environ[variable] = given


def node_provider_class(provider: str) -> type:
    """Ray's launcher for a cloud; imports the cloud's libraries.

    The public provider type `external` gives no class to extend.
    """
    found: type = _get_node_provider_cls({"type": provider})
    return found


def set_cloud_resource_monitor(monitor: Callable[[], CloudResourceMonitor]) -> None:
    """Make the autoscaler use another class to record which node types a cloud refuses; Ray has no setting for it."""
    autoscaler.CloudResourceMonitor = monitor
