"""Check a configuration's pools against a cluster file's nodes: resources, cards, memory, worker counts and prices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from moedisco_ray.core.config import Pool, RunConfig
from moedisco_ray.plan.build import Plan
from moedisco_ray.plan.cluster_file import Cluster, NodeType
from moedisco_ray.plan.memory import GIB

_PRICE_TOLERANCE = 0.01


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


def disagreements(cluster: Cluster, config: RunConfig, plan: Plan) -> tuple[Disagreement, ...]:
    """All contradictions between a cluster file and a configuration's pools; `plan` has the memory of their workers."""
    low, high = config.pools.low_memory, config.pools.high_memory
    # In a mixed pool, no sub-model runs on a node type that is too small for it. So a node type in the cluster file
    # only needs the memory that the configuration says.
    of_low = (
        [
            each
            for i, kind in enumerate(low.node_types)
            for each in _of_pool(
                cluster,
                kind,
                f"{_path(low)}.types.{i}",
                need_gb=kind.memory_gb,
                count="max_workers",
                workers=kind.max_workers,
            )
        ]
        if low.mixed
        else _of_pool(
            cluster, low, _path(low), need_gb=_need_gb(plan, low), count="max_workers", workers=low.max_workers
        )
    )
    of_owners = [
        each
        for owner in config.pools.of_owners
        for each in _of_nodes(_offering(cluster, owner), cluster, owner, owner.path, need_gb=_need_gb(plan, low))
    ]
    return (
        *of_low,
        *of_owners,
        *_of_pool(cluster, high, _path(high), need_gb=_need_gb(plan, high), count="workers", workers=high.most_workers),
    )


def _path(pool: Pool) -> str:
    return f"pools.{pool.name}"


def _need_gb(plan: Plan, pool: Pool) -> float:
    """Memory that the largest worker of a pool needs (GiB)."""
    return (
        max((stage.memory.total for stage in (*plan.stages, *plan.inference) if stage.pool == pool.name), default=0)
        / GIB
    )


def _of_pool(
    cluster: Cluster, pool: Pool, path: str, *, need_gb: float, count: str, workers: int
) -> list[Disagreement]:
    offering = _offering(cluster, pool)
    found = _of_nodes(offering, cluster, pool, path, need_gb=need_gb)
    if not offering:
        return found
    room = cluster.room(pool.resource)
    if workers > room:
        found.append(
            Disagreement(
                f"{path}.{count}", workers, f"the file starts room for {room}; lower it, or let the file start more"
            )
        )
    prices = [node.worker_price(pool.resource) for node in offering]
    lowest, highest = min(prices), max(prices)
    if not lowest * (1 - _PRICE_TOLERANCE) <= pool.price_per_hour <= highest * (1 + _PRICE_TOLERANCE):
        found.append(
            Disagreement(
                f"{path}.price_per_hour",
                pool.price_per_hour,
                f"a worker costs {lowest:.2f} to {highest:.2f} on {_names(offering)}; set what you expect to pay",
            )
        )
    return found


def _offering(cluster: Cluster, pool: Pool) -> list[NodeType]:
    return [node for node in cluster.types if node.most and pool.resource in node.slots]


def _of_nodes(
    offering: list[NodeType], cluster: Cluster, pool: Pool, path: str, *, need_gb: float
) -> list[Disagreement]:
    if not offering:
        has = ", ".join(sorted({tag for node in cluster.types for tag in node.slots})) or "no tags"
        return [Disagreement(f"{path}.resource", pool.resource, f"no node type offers it; the file has {has}")]
    settings = path if pool.owner is None else _path(pool)  # an owner's nodes are as those of the low-memory pool
    return [
        *_of_gpus(offering, pool),
        *_of_cards(offering, pool, settings),
        *_of_memory(offering, pool, need_gb, settings),
        *_of_host(offering, pool, settings),
    ]


def _of_gpus(offering: list[NodeType], pool: Pool) -> list[Disagreement]:
    crowded = [node for node in offering if node.resources[pool.resource] * pool.gpu > node.gpus]
    idle = [node for node in offering if node.gpus and not pool.gpu]
    checks = (
        (crowded, f"{_names(crowded)} offers more {pool.resource} than it has GPUs"),
        (idle, f"the GPUs of {_names(idle)} would idle; set it to 1"),
    )
    found = [Disagreement(f"{_path(pool)}.gpu", pool.gpu, remedy) for nodes, remedy in checks if nodes]
    few = [node for node in offering if node.slots[pool.resource] < pool.gpus_per_node]
    if few:
        remedy = f"{_names(few)} has room for {min(node.slots[pool.resource] for node in few)}; lower it"
        found.append(Disagreement(f"{_path(pool)}.gpus_per_node", pool.gpus_per_node, remedy))
    return found


def _of_cards(offering: list[NodeType], pool: Pool, path: str) -> list[Disagreement]:
    """A disagreement if the pool's card is not one that the file starts, or computes in another precision."""
    cards = {node.card.name: node for node in offering if node.card is not None and pool.gpu}
    if not cards or path.startswith("pools.owners"):
        return []
    starts = f"the file starts {', '.join(cards)}"
    if pool.card is None:
        return [Disagreement(f"{path}.card", None, f"{starts}; name the one that you expect, so that its speed counts")]
    if pool.card not in cards:
        return [Disagreement(f"{path}.card", pool.card, f"{starts}; name one of these, or let the file start others")]
    old = [name for name, node in cards.items() if node.card is not None and not node.card.bf16]
    if old and pool.bf16:
        nodes = _names(cards[name] for name in old)
        return [
            Disagreement(
                f"{path}.card",
                pool.card,
                f"{starts}, and {', '.join(old)} has no bf16, in which others compute; set max_workers of {nodes} to 0",
            )
        ]
    return []


def _of_memory(offering: list[NodeType], pool: Pool, need_gb: float, path: str) -> list[Disagreement]:
    small = [node for node in offering if pool.gpu and node.gpus and need_gb > node.gpu_memory_gb]
    if not small:
        return []
    least = min(node.gpu_memory_gb for node in small)
    return [
        Disagreement(
            f"{path}.memory_gb",
            pool.memory_gb,
            f"a worker needs {need_gb:.1f} GiB and a GPU of {_names(small)} has only {least:g}; "
            f"set it to {least:g} to see what would fit, or max_workers of {_names(small)} to 0",
        )
    ]


def _of_host(offering: list[NodeType], pool: Pool, path: str) -> list[Disagreement]:
    known = [node for node in offering if node.memory_gb is not None]
    least = min(known, key=lambda node: node.memory_gb or 0.0, default=None)
    if pool.host_memory_gb is None or least is None or (least.memory_gb or 0.0) >= pool.host_memory_gb:
        return []
    remedy = f"a node {least.name} has {least.memory_gb:g}; set it to that, or let the file start larger ones"
    return [Disagreement(f"{path}.host_memory_gb", pool.host_memory_gb, remedy)]


def _names(types: Iterable[NodeType]) -> str:
    return ", ".join(node.name for node in types)
