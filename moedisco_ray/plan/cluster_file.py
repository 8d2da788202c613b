"""The nodes that a cluster file can start: their resources, GPUs, memory, disks, maximum numbers and prices.

Facts for which Ray has no field are in the file's top-level `metadata`, which Ray ignores. `moedisco.node_types` in it
states, for example, `gpu` and `price_per_hour` of each node type, including the head's. In a file for
existing hosts (`provider: local`), `moedisco.hosts` states the node type of each host. A KubeRay file states the same
facts as annotations of the pods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from moedisco_ray.core.cards import Card, find_card, known_card
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.config.yaml_text import YamlError, parse_documents
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan.memory import GIB

ANNOTATION_PREFIX = "moedisco/"
_QUANTITIES = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
"""Bytes per unit of a Kubernetes quantity such as 8Gi."""


class NodeFacts(BaseModel):
    """Entry of a node type in the `metadata` of a cluster file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    gpu: str | None = None
    """Name of the GPU model, such as L4 or A100-80GB; null for a node without GPUs."""
    gpu_memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of one GPU (GiB); null: that of the card (`moedisco_ray.core.cards`), or 0 for a node without GPUs."""
    price_per_hour: Annotated[float, Field(ge=0)]
    """Price of the whole node (dollars per hour)."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """Memory of the machine (GiB); null if unknown, in which case it is not checked."""
    disk_gb: Annotated[float, Field(gt=0)] | None = None
    """Disk space of the machine (GB); null if unknown, in which case it is not checked."""
    transfer_price_per_gb: Annotated[float, Field(ge=0)] = 0
    """Price of data transfer between the storage and the node (dollars per GB); 0 if both are in the same region."""
    resources: dict[str, Annotated[int, Field(ge=0)]] = {}
    """Resources that a node offers to Ray. Only for machines that Ray does not start: existing hosts, and machines that
    join."""
    labels: dict[str, str] = {}
    """Labels that a node has in Ray. Only for existing hosts."""

    @model_validator(mode="after")
    def _memory_is_known(self) -> Self:
        if self.gpu is not None and self.gpu_memory_gb is None:
            known_card(self.gpu)
        return self

    @property
    def card(self) -> Card | None:
        """The GPU; None for a node without GPUs, or with a GPU that is not in the table of cards."""
        return None if self.gpu is None else find_card(self.gpu)


class ClusterMetadata(BaseModel):
    """The section `metadata.moedisco` of a cluster file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prices_as_of: Annotated[str, Field(pattern=r"^\d{4}-\d{2}$")]
    """Month in which the prices were looked up, such as 2025-06."""
    node_types: dict[str, NodeFacts]
    hosts: dict[str, str] = {}
    """Node type by host address; only for `provider: local`."""
    joining: dict[str, Annotated[int, Field(ge=0)]] = {}
    """Maximum number of machines that join with `moedisco join`, by node type."""


@dataclasses.dataclass(frozen=True)
class NodeType:
    """A node type that a cluster file can start.

    Attributes:
        name: Key of the node type in the cluster file.
        most: Maximum number of nodes of this type at once.
        resources: Resources of a node.
        gpu_memory_gb: Memory of one GPU (GiB).
        card: The GPU; None for a node without GPUs, or with a GPU that is not in the table of cards.
        price_per_hour: Dollars per node-hour.
        memory_gb: Memory of the machine (GiB); None if unknown.
        disk_gb: Disk space of the machine (GB); None if unknown.
        transfer_price_per_gb: Price of data transfer between the storage and a node (dollars per GB).
        joins: Whether machines of this type join with `moedisco join`; the file's limit on workers does not count them.
    """

    name: str
    most: int
    resources: Mapping[str, int]
    gpu_memory_gb: float
    price_per_hour: float
    card: Card | None = None
    memory_gb: float | None = None
    disk_gb: float | None = None
    transfer_price_per_gb: float = 0
    joins: bool = False

    @property
    def gpus(self) -> int:
        """GPUs of one node."""
        return self.resources.get("GPU", 0)

    @property
    def slots(self) -> Mapping[str, int]:
        """Amount of each custom resource on a node, which is the number of workers of that pool that fit there."""
        return {
            name: amount for name, amount in self.resources.items() if amount and name not in ("CPU", "GPU", "memory")
        }

    def worker_price(self, tag: str) -> float:
        """Dollars per worker-hour on a node whose slots are all in use."""
        return self.price_per_hour / self.slots[tag]


@dataclasses.dataclass(frozen=True)
class Head:
    """The machine of the cluster's head.

    Attributes:
        name: Node type of the head in the cluster file.
        memory_gb: Memory (GiB); None if unknown.
        disk_gb: Disk space (GB); None if unknown.
    """

    name: str
    memory_gb: float | None = None
    disk_gb: float | None = None


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The nodes that a cluster file can start.

    Attributes:
        types: Types of worker nodes, in the order of the cluster file.
        head: The head's machine.
        limit: Name of the file's setting that limits the number of worker nodes.
        most: Maximum number of worker nodes of all types together; None if the file sets no such limit.
    """

    types: tuple[NodeType, ...]
    head: Head
    limit: str
    most: int | None = None

    def room(self, resource: str) -> int:
        """Maximum amount of a resource that the nodes offer at the same time."""
        started = [node for node in self.types if not node.joins]
        each = sorted((node.resources.get(resource, 0) for node in started for _ in range(node.most)), reverse=True)
        return sum(each[: self.most]) + sum(
            node.most * node.resources.get(resource, 0) for node in self.types if node.joins
        )


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file for `ray up` or KubeRay.

    Raises:
        ConfigError: The file cannot be read, or lacks a part that the checks need.
    """
    try:
        documents = [document for document in parse_documents(path.read_text(encoding="utf-8")) if document is not None]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--cluster", str(path), f"cannot be read ({error})") from error
    except YamlError as error:
        raise ConfigError("--cluster", str(path), str(error)) from error
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
                return _kuberay_cluster(document["spec"])
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError("--cluster", source, f"{'.'.join(map(str, first['loc']))} {plain_words(first)}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError("--cluster", source, f"lacks a part that every cluster file has ({error!r})") from error
    raise ConfigError("--cluster", source, "is neither a file for `ray up` nor a RayCluster")


def _launcher_cluster(document: Mapping[str, Any]) -> Cluster:
    metadata = ClusterMetadata.model_validate(document["metadata"]["moedisco"])
    provider = document["provider"]
    if provider["type"] == "local":
        hosts = [metadata.hosts[address] for address in provider["worker_ips"]]
        types = tuple(
            _node_type(name, hosts.count(name), facts.resources, facts)
            for name, facts in metadata.node_types.items()
            if name in hosts
        )
        return Cluster(
            types + _joining(metadata),
            _head(metadata, metadata.hosts.get(provider["head_ip"], "head")),
            "provider.worker_ips",
        )
    most, head = document["max_workers"], document["head_node_type"]
    types = tuple(
        _node_type(name, kind.get("max_workers", most), kind["resources"], metadata.node_types[name])
        for name, kind in document["available_node_types"].items()
        if name != head
    )
    return Cluster(types + _joining(metadata), _head(metadata, head), "max_workers", most)


def _joining(metadata: ClusterMetadata) -> tuple[NodeType, ...]:
    return tuple(
        dataclasses.replace(
            _node_type(name, most, metadata.node_types[name].resources, metadata.node_types[name]), joins=True
        )
        for name, most in metadata.joining.items()
    )


def _head(metadata: ClusterMetadata, name: str) -> Head:
    facts = metadata.node_types.get(name)
    return Head(name) if facts is None else Head(name, facts.memory_gb, facts.disk_gb)


def _node_type(name: str, most: int, resources: Mapping[str, int], facts: NodeFacts) -> NodeType:
    card = facts.card
    return NodeType(
        name,
        most,
        resources,
        facts.gpu_memory_gb or (0 if card is None else card.memory_gb),
        facts.price_per_hour,
        card=card,
        memory_gb=facts.memory_gb,
        disk_gb=facts.disk_gb,
        transfer_price_per_gb=facts.transfer_price_per_gb,
    )


def _kuberay_cluster(spec: Mapping[str, Any]) -> Cluster:
    template = spec["headGroupSpec"]["template"]
    facts = NodeFacts.model_validate({"price_per_hour": 0} | _pod_facts(template))  # the head has no price of its own
    types = tuple(_kuberay_type(group) for group in spec["workerGroupSpecs"])
    return Cluster(types, Head("headGroupSpec", facts.memory_gb, facts.disk_gb), "maxReplicas")


def _kuberay_type(group: Mapping[str, Any]) -> NodeType:
    template = group["template"]
    gpus = sum(
        int(container["resources"]["limits"].get("nvidia.com/gpu", 0)) for container in template["spec"]["containers"]
    )
    resources = {name: int(amount) for name, amount in group["resources"].items()} | {"GPU": gpus}
    return _node_type(
        group["groupName"], group["maxReplicas"], resources, NodeFacts.model_validate(_pod_facts(template))
    )


def _pod_facts(template: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about a pod, from its annotations and the memory limits of its containers."""
    noted = {
        key.removeprefix(ANNOTATION_PREFIX).replace("-", "_"): value
        for key, value in template.get("metadata", {}).get("annotations", {}).items()
        if key.startswith(ANNOTATION_PREFIX)
    }
    limits = [container["resources"]["limits"]["memory"] for container in template["spec"]["containers"]]
    return {"memory_gb": sum(_gigabytes(limit) for limit in limits)} | noted


def _gigabytes(quantity: str) -> float:
    """Convert a memory quantity of Kubernetes, such as 8Gi, to GiB."""
    unit = quantity.lstrip("0123456789.")
    return float(quantity.removesuffix(unit)) * _QUANTITIES[unit] / GIB
