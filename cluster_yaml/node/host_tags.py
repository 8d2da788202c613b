"""Print the arguments of `ray start` for this host, one per line, from its node type in a cluster file."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import psutil
import yaml

from moedisco_ray.plan.cluster_file import ClusterMetadata


def arguments(metadata: ClusterMetadata, addresses: set[str]) -> list[str]:
    """Arguments with the resources and labels of the host that has one of the addresses."""
    named = [node_type for host, node_type in metadata.hosts.items() if host in addresses]
    if not named:
        raise SystemExit(
            f"metadata.moedisco.hosts has no entry for this host's addresses: {', '.join(sorted(addresses))}"
        )
    node = metadata.node_types[named[0]]
    custom = {name: amount for name, amount in node.resources.items() if name not in ("CPU", "GPU")}
    counted = [f"--num-{name.lower()}s={node.resources[name]}" for name in ("CPU", "GPU") if name in node.resources]
    labels = ",".join(f"{name}={value}" for name, value in node.labels.items())
    return [
        f"--node-ip-address={next(host for host in metadata.hosts if host in addresses)}",
        f"--resources={json.dumps(custom)}",
        f"--labels={labels}",
        *counted,
    ]


def own_addresses() -> set[str]:
    """IPv4 addresses of this host's interfaces."""
    return {
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET
    }


if __name__ == "__main__":
    given = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    cluster = ClusterMetadata.model_validate(given["metadata"]["moedisco"])
    print("\n".join(arguments(cluster, own_addresses())))  # noqa: T201
