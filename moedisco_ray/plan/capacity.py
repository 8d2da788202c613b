"""Check that the machines of a cluster file have the memory and disk for a run, and compute the price of its traffic.

If the file does not state the memory or disk of a machine, it is not checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pydantic import BaseModel

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.limits import USABLE_MEMORY, WORKER_PROCESS_GB
from moedisco_ray.plan.build import Plan
from moedisco_ray.plan.cluster_checks import Disagreement
from moedisco_ray.plan.cluster_file import Cluster, NodeType
from moedisco_ray.plan.files import StageStorage
from moedisco_ray.plan.memory import GIB

HEAD_PROCESSES_MB = 2000
"""Memory of Ray's GCS, raylet, dashboard, agents and autoscaler on the head (MB): 520 when idle, and they grow."""
DRIVER_MB = 600
"""Memory of a run's driver on the head, including torch (MB); measured with `benchmarks/seats.py`."""
SEAT_MB = 20
"""Maximum memory on the head per sub-model that trains on another machine (MB); measured with `benchmarks/seats.py`."""
GANG_MB = 700
"""Memory on the head for a gang (MB): the controller and helper actors of its TorchTrainer; measured with
`benchmarks/seats.py`."""
SYSTEM_DISK_GB = 60
"""Disk space for the operating system, GPU driver, installed packages and Ray's logs (GB)."""
STATE_DISK_GB = 20
"""Disk space on the head for the service's database and the logs of all runs (GB); the run directories are stored
elsewhere."""
_MB_PER_GB = 1024


class ClusterNeeds(BaseModel, frozen=True, defer_build=True):
    """Memory, disk and traffic that a run needs on the machines of a cluster file."""

    head_memory_gb: float
    """Memory that the head needs if all nodes that the file allows train sub-models (GiB)."""
    head_disk_gb: float
    unused: tuple[str, ...]
    """Node types whose tags no pool of the configuration names, so that the plan does not know them."""
    submodels: int
    """Maximum number of sub-models that the nodes of the cluster file train at the same time."""
    moved_bytes: int
    """Number of bytes that all nodes together read from the storage and write to it."""
    transfer_dollars: float
    """Price of transferring `moved_bytes`, if each stage uses the node type of its pool with the most expensive
    transfer."""


def cluster_needs(cluster: Cluster, config: RunConfig, plan: Plan) -> ClusterNeeds:
    """Compute the head's memory and disk, and the traffic with its price, for a run on the machines of a cluster."""
    submodels, pools = _submodels(cluster, config), config.pools
    tags = {tag for pool in (pools.low_memory, pools.high_memory, *pools.of_owners) for tag in pool.tags}
    return ClusterNeeds(
        unused=tuple(node.name for node in cluster.types if node.slots and tags.isdisjoint(node.slots)),
        head_memory_gb=head_memory_mb(submodels, gang=_has_gang(config)) / _MB_PER_GB,
        head_disk_gb=SYSTEM_DISK_GB + STATE_DISK_GB,
        submodels=submodels,
        moved_bytes=sum(stage.moved for stage in plan.storage),
        transfer_dollars=sum(_transfer_dollars(cluster, config, stage) for stage in plan.storage),
    )


def _transfer_dollars(cluster: Cluster, config: RunConfig, stage: StageStorage) -> float:
    """Price of a stage's traffic on the nodes of its pool where traffic is most expensive."""
    prices = (node.transfer_price_per_gb for node in _nodes_of(cluster, config, stage.pool))
    return stage.moved / GIB * max(prices, default=0)


def head_memory_mb(submodels: int, *, gang: bool) -> int:
    """Memory that the head needs for one run (MB).

    Args:
        submodels: Number of sub-models that train at the same time.
        gang: Whether a gang trains the whole MoE.
    """
    return HEAD_PROCESSES_MB + DRIVER_MB + SEAT_MB * submodels + GANG_MB * gang


def usable_mb(memory_gb: float) -> int:
    """Memory of a machine that processes may use before Ray kills some of them (MB)."""
    return math.floor(memory_gb * _MB_PER_GB * USABLE_MEMORY)


def lacking(cluster: Cluster, config: RunConfig, plan: Plan) -> tuple[Disagreement, ...]:
    """A `Disagreement` for each machine of a cluster file that lacks memory or disk for workers that may run on it."""
    nodes = (node for node in cluster.types if node.most)
    return (*_of_head(cluster, config), *(each for node in nodes for each in _of_node(cluster, node, config, plan)))


def _of_head(cluster: Cluster, config: RunConfig) -> Iterator[Disagreement]:
    head, submodels, gang = cluster.head, _submodels(cluster, config), _has_gang(config)
    need = head_memory_mb(submodels, gang=gang)
    if head.memory_gb is not None and need > usable_mb(head.memory_gb):
        fewer = (usable_mb(head.memory_gb) - head_memory_mb(0, gang=gang)) // SEAT_MB
        lower = f"let the file start at most {fewer} (`{cluster.limit}`), or give" if fewer > 0 else "give"
        yield Disagreement(
            f"{head.name}.memory_gb",
            head.memory_gb,
            f"the head needs {need / _MB_PER_GB:.1f} GiB, and 5 % free, for the {submodels} sub-models that may train "
            f"at once; {lower} it more memory",
        )
    disk = SYSTEM_DISK_GB + STATE_DISK_GB
    if head.disk_gb is not None and disk > head.disk_gb:
        yield Disagreement(f"{head.name}.disk_gb", head.disk_gb, f"the head needs {disk} GB; give it a larger disk")


def _of_node(cluster: Cluster, node: NodeType, config: RunConfig, plan: Plan) -> Iterator[Disagreement]:
    memory, disk = 0.0, 0.0
    for stage in plan.storage:
        if stage.pool == "cpu":
            with_cores = sum(each.most for each in cluster.types if each.resources.get("CPU"))
            needed = stage.node_disk / with_cores + stage.worker_disk if node.resources.get("CPU") else 0.0
            disk = max(disk, needed / GIB)
        elif node in _nodes_of(cluster, config, stage.pool):
            workers = min(stage.workers, max(node.slots.get(tag, 0) for tag in config.pools.at(stage.pool).tags))
            disk = max(disk, (stage.node_disk + workers * stage.worker_disk) / GIB)
            memory = max(memory, workers * (stage.worker_memory / GIB + WORKER_PROCESS_GB))
    if node.memory_gb is not None and memory * _MB_PER_GB > usable_mb(node.memory_gb):
        yield Disagreement(
            f"{node.name}.memory_gb",
            node.memory_gb,
            f"a node needs {memory:.1f} GiB, and 5 % free, because checkpoints wait there until they are stored; "
            "choose a larger machine, or set the maximum number of nodes to 0",
        )
    disk += SYSTEM_DISK_GB
    if node.disk_gb is not None and disk > node.disk_gb:
        yield Disagreement(
            f"{node.name}.disk_gb",
            node.disk_gb,
            f"a node needs {disk:.0f} GB for system, inputs, results and a checkpoint; give it a larger disk, or set "
            "the maximum number of nodes to 0",
        )


def _nodes_of(cluster: Cluster, config: RunConfig, pool: str) -> list[NodeType]:
    if pool == "cpu":
        return [node for node in cluster.types if node.most and node.resources.get("CPU")]
    return [node for node in cluster.types if node.most and set(config.pools.at(pool).tags) & set(node.slots)]


def _submodels(cluster: Cluster, config: RunConfig) -> int:
    return sum(cluster.room(tag) for tag in config.pools.submodels.tags)


def _has_gang(config: RunConfig) -> bool:
    return config.tokens.finetune > 0 or (config.tokens.seed > 0 and config.pools.low_memory.seed_workers != 1)
