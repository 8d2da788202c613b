"""Check a configuration against the nodes that a cluster file starts: resources, GPUs, memory, number of workers and prices.

Ray ignores a file's top-level `metadata`. There, `moedisco.node_types` holds the facts that Ray has no field for: `gpu_memory_gb`
and `price_per_hour` of each node type. In a file for existing hosts (`provider: local`), `moedisco.hosts` holds each host's node
type. A RayCluster of KubeRay has the same facts as annotations of each worker group's pods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moedisco_ray.core.config import Pool, RunConfig
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan.build import Plan
from moedisco_ray.plan.memory import GIB

ANNOTATION_PREFIX = "moedisco/"
_PRICE_TOLERANCE = 0.01


class NodeFacts(BaseModel):
    """Entry of a node type in the `metadata` of a cluster file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    gpu: str | None = None
    """Model of the node's GPUs."""
    gpu_memory_gb: Annotated[float, Field(ge=0)] = 0
    """Memory of one GPU (GB)."""
    price_per_hour: Annotated[float, Field(ge=0)]
    """Price of the whole node (dollars per hour)."""
    resources: dict[str, Annotated[int, Field(ge=0)]] = {}
    """Resources that a node offers to Ray; only for existing hosts, which Ray does not start."""
    labels: dict[str, str] = {}
    """Ray labels of a node; only for existing hosts, which Ray does not start."""


class ClusterMetadata(BaseModel):
    """`metadata.moedisco` of a cluster file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prices_as_of: Annotated[str, Field(pattern=r"^\d{4}-\d{2}$")]
    """Month in which the prices were looked up, such as 2025-06."""
    node_types: dict[str, NodeFacts]
    hosts: dict[str, str] = {}
    """Node type by host address; only for `provider: local`."""


@dataclasses.dataclass(frozen=True)
class NodeType:
    """A node type that a cluster file can start.

    Attributes:
        name: Key of the node type in the cluster file.
        most: Maximum number of nodes of this type at once.
        resources: Resources of a node.
        gpu_memory_gb: Memory of one GPU (GB).
        price_per_hour: Dollars per node-hour.
    """

    name: str
    most: int
    resources: Mapping[str, int]
    gpu_memory_gb: float
    price_per_hour: float

    @property
    def gpus(self) -> int:
        """GPUs of one node."""
        return self.resources.get("GPU", 0)

    @property
    def slots(self) -> Mapping[str, int]:
        """Number of workers that fit on a node, by the resource that their pool requests."""
        return {name: amount for name, amount in self.resources.items() if amount and name not in ("CPU", "GPU", "memory")}

    def worker_price(self, tag: str) -> float:
        """Dollars per worker-hour on a full node."""
        return self.price_per_hour / self.slots[tag]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The worker nodes that a cluster file can start.

    Attributes:
        types: Node types, in the order of the cluster file.
        most: Maximum number of nodes of all types together; None: no such limit.
    """

    types: tuple[NodeType, ...]
    most: int | None = None

    def room(self, resource: str) -> int:
        """Maximum amount of a resource that the nodes offer at the same time."""
        each = sorted((node.resources.get(resource, 0) for node in self.types for _ in range(node.most)), reverse=True)
        return sum(each[:self.most])


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """A setting that contradicts a cluster file.

    Attributes:
        field: Dotted path of the setting.
        remedy: What the cluster file says instead, and what to change.
    """

    field: str
    value: object
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.value!r}: {self.remedy}"


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file for `ray up` or KubeRay.

    Raises:
        ConfigError: The file cannot be read, or lacks a part that the checks need.
    """
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--cluster", str(path), f"cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError("--cluster", str(path), f"is not YAML ({' '.join(str(error).split())})") from error
    return read_cluster(documents, str(path))


def read_cluster(documents: Iterable[Any], source: str) -> Cluster:
    """The worker nodes of a parsed cluster file.

    Args:
        documents: One dictionary for `ray up`, or all objects of a KubeRay file.
        source: Name of the cluster file, for errors.

    Raises:
        ConfigError: The file lacks a part that the checks need.
    """
    given = [document for document in documents if isinstance(document, dict)]
    try:
        for document in given:
            if "provider" in document:
                return _launcher_cluster(document)
            if document.get("kind") == "RayCluster":
                return Cluster(tuple(_kuberay_type(group) for group in document["spec"]["workerGroupSpecs"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError("--cluster", source, f"lacks a part that every cluster file has ({error!r})") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError("--cluster", source, f"{'.'.join(map(str, first['loc']))} {plain_words(first)}") from error
    raise ConfigError("--cluster", source, "is neither a file for `ray up` nor a RayCluster")


def disagreements(cluster: Cluster, config: RunConfig, plan: Plan) -> tuple[Disagreement, ...]:
    """All contradictions between a cluster file and a configuration's pools; `plan` gives the memory of workers."""
    low, high = config.pools.low_memory, config.pools.high_memory
    # In a mixed pool, no sub-model runs on a type that is too small for it. So each type only needs its configured memory.
    of_low = (
        [each for i, kind in enumerate(low.node_types)
         for each in _of_pool(
             cluster, kind, f"{_path(low)}.types.{i}", need_gb=kind.memory_gb, count="max_workers", workers=kind.max_workers)]
        if low.mixed else _of_pool(
            cluster, low, _path(low), need_gb=_need_gb(plan, low), count="max_workers", workers=low.max_workers))
    return (*of_low, *_of_pool(
        cluster, high, _path(high), need_gb=_need_gb(plan, high), count="workers", workers=high.most_workers))


def _path(pool: Pool) -> str:
    return f"pools.{pool.name}"


def _need_gb(plan: Plan, pool: Pool) -> float:
    """Memory of the largest worker of a pool (GB)."""
    return max((stage.memory.total for stage in plan.stages if stage.pool == pool.name), default=0) / GIB


def _of_pool(cluster: Cluster, pool: Pool, path: str, *, need_gb: float, count: str, workers: int) -> list[Disagreement]:
    offering = [node for node in cluster.types if node.most and pool.resource in node.slots]
    if not offering:
        has = ", ".join(sorted({tag for node in cluster.types for tag in node.slots})) or "no tags"
        return [Disagreement(f"{path}.resource", pool.resource, f"no node type offers it; the file has {has}")]
    found = [*_of_gpus(offering, pool), *_of_memory(offering, pool, need_gb, path)]
    room = cluster.room(pool.resource)
    if workers > room:
        found.append(Disagreement(
            f"{path}.{count}", workers, f"the file starts room for {room}; lower it, or let the file start more"))
    prices = [node.worker_price(pool.resource) for node in offering]
    lowest, highest = min(prices), max(prices)
    if not lowest * (1 - _PRICE_TOLERANCE) <= pool.price_per_hour <= highest * (1 + _PRICE_TOLERANCE):
        found.append(Disagreement(
            f"{path}.price_per_hour", pool.price_per_hour,
            f"a worker costs {lowest:.2f} to {highest:.2f} on {_names(offering)}; set what you expect to pay"))
    return found


def _of_gpus(offering: list[NodeType], pool: Pool) -> list[Disagreement]:
    crowded = [node for node in offering if node.resources[pool.resource] * pool.gpu > node.gpus]
    idle = [node for node in offering if node.gpus and not pool.gpu]
    checks = (
        (crowded, f"{_names(crowded)} offers more {pool.resource} than it has GPUs"),
        (idle, f"the GPUs of {_names(idle)} would idle; set it to 1"))
    return [Disagreement(f"{_path(pool)}.gpu", pool.gpu, remedy) for nodes, remedy in checks if nodes]


def _of_memory(offering: list[NodeType], pool: Pool, need_gb: float, path: str) -> list[Disagreement]:
    small = [node for node in offering if pool.gpu and node.gpus and need_gb > node.gpu_memory_gb]
    if not small:
        return []
    least = min(node.gpu_memory_gb for node in small)
    return [Disagreement(
        f"{path}.memory_gb", pool.memory_gb,
        f"a worker needs {need_gb:.1f} GB and a GPU of {_names(small)} has only {least:g}; "
        f"set it to {least:g} to see what would fit, or max_workers of {_names(small)} to 0")]


def _launcher_cluster(document: Mapping[str, Any]) -> Cluster:
    metadata = ClusterMetadata.model_validate(document["metadata"]["moedisco"])
    if document["provider"]["type"] == "local":
        hosts = [metadata.hosts[address] for address in document["provider"]["worker_ips"]]
        return Cluster(tuple(
            NodeType(name, hosts.count(name), facts.resources, facts.gpu_memory_gb, facts.price_per_hour)
            for name, facts in metadata.node_types.items() if name in hosts))
    most = document["max_workers"]
    return Cluster(tuple(
        NodeType(
            name, kind.get("max_workers", most), kind["resources"],
            metadata.node_types[name].gpu_memory_gb, metadata.node_types[name].price_per_hour)
        for name, kind in document["available_node_types"].items() if name != document["head_node_type"]), most)


def _kuberay_type(group: Mapping[str, Any]) -> NodeType:
    pods = group["template"]
    facts = NodeFacts.model_validate({
        key.removeprefix(ANNOTATION_PREFIX).replace("-", "_"): value
        for key, value in pods["metadata"]["annotations"].items() if key.startswith(ANNOTATION_PREFIX)})
    gpus = sum(int(container["resources"]["limits"].get("nvidia.com/gpu", 0)) for container in pods["spec"]["containers"])
    resources = {name: int(amount) for name, amount in group["resources"].items()}
    return NodeType(group["groupName"], group["maxReplicas"], resources | {"GPU": gpus}, facts.gpu_memory_gb, facts.price_per_hour)


def _names(types: Iterable[NodeType]) -> str:
    return ", ".join(node.name for node in types)
