"""A cluster file as a table of its node types, and whether a configuration's pools match it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moedisco_ray.cli.display.formatting import PlainTable, gigabytes
from moedisco_ray.core.records.bill import format_dollars
from moedisco_ray.plan.capacity import ClusterNeeds
from moedisco_ray.plan.cluster_file import Cluster


def cluster_view(cluster: Cluster, needs: ClusterNeeds, file: str, *, agrees: bool) -> RenderableType:
    """View of a cluster file: its node types, its head, the price of traffic, and whether the pools match it."""
    table = PlainTable("node type", "workers", "of", "GiB per GPU", "dollars per worker-hour")
    for node in cluster.types:
        for tag, slots in node.slots.items():
            memory = f"{node.gpu_memory_gb:g}" if node.gpus else ""
            table.add_row(node.name, f"up to {slots * node.most}", tag, memory, f"{node.worker_price(tag):.2f}")
    unused = f"Not planned with, because no pool names their tags: {', '.join(needs.unused)}"
    of_types = [Text(unused, "yellow")] if needs.unused else []
    head = cluster.head
    of_head = (
        f"The head needs {needs.head_memory_gb:.1f} of {_stated(head.memory_gb)} GiB memory and {needs.head_disk_gb:g} "
        f"of {_stated(head.disk_gb)} GB disk; the file lets {needs.submodels} sub-models train at once"
    )
    traffic, price = gigabytes(needs.moved_bytes), format_dollars(needs.transfer_dollars)
    network = f"Network: {traffic} GiB between storage and nodes, {price}"
    verdict = (
        Text(f"The pools agree with {file}", "green") if agrees else Text(f"The pools contradict {file}:", "bold red")
    )
    return Group(Padding(table, (1, 0)), *of_types, Text(of_head), Text(network), verdict)


def _stated(size: float | None) -> str:
    return "unknown" if size is None else f"{size:g}"
