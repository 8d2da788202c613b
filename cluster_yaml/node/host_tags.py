"""Print, one a line, the arguments of `ray start` for this host, whose type `metadata.moedisco.hosts` of a cluster file names."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import psutil
import yaml

from moedisco_ray.plan.cluster_file import ClusterMetadata


def arguments(metadata: ClusterMetadata, addresses: set[str]) -> list[str]:
    """Resources and labels of the host that has one of the addresses.

    Args:
        metadata: Of the cluster file.
        addresses: Of this host.
    """
    named = [kind for host, kind in metadata.hosts.items() if host in addresses]
    if not named:
        raise SystemExit(f"metadata.moedisco.hosts names none of this host's addresses: {', '.join(sorted(addresses))}")
    facts = metadata.node_types[named[0]]
    custom = {name: amount for name, amount in facts.resources.items() if name not in ("CPU", "GPU")}
    counted = [f"--num-{name.lower()}s={facts.resources[name]}" for name in ("CPU", "GPU") if name in facts.resources]
    labels = ",".join(f"{name}={value}" for name, value in facts.labels.items())
    return [f"--node-ip-address={next(host for host in metadata.hosts if host in addresses)}",
            f"--resources={json.dumps(custom)}", f"--labels={labels}", *counted]


def own_addresses() -> set[str]:
    """IPv4 addresses of this host's interfaces."""
    return {entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family == socket.AF_INET}


if __name__ == "__main__":
    given = yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("\n".join(arguments(ClusterMetadata.model_validate(given["metadata"]["moedisco"]), own_addresses())))  # noqa: T201
