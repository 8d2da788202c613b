"""Name the network interface by which the workers of a gang reach each other.

Otherwise gloo takes the address to which the host's own name leads, which is 127.0.1.1 on Debian and Ubuntu, where no
other host reaches it; and NCCL takes the first interface, which may be a bridge of containers or a VPN.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import psutil
import ray


def name_interface() -> None:
    """Let gloo and NCCL of this process use the interface of its node's address in the Ray cluster.

    A variable that the user has set keeps its value. Nothing is set if no interface has the address, as behind address
    translation.
    """
    addresses = [(name, each.address) for name, found in psutil.net_if_addrs().items() for each in found]
    for variable, value in interface_variables(ray.util.get_node_ip_address(), addresses).items():
        os.environ.setdefault(variable, value)


def interface_variables(address: str, addresses: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Environment variables by which gloo and NCCL use the interface that has an address; empty if none has it.

    Args:
        address: Address of the node in the Ray cluster; a loopback address selects the loopback interface.
        addresses: Each interface with each of its addresses. An IPv6 address may end with `%` and the interface.
    """
    found = next((name for name, own in addresses if own.partition("%")[0] == address), None)
    if found is None:
        return {}
    # NCCL takes a name without `=` as a prefix, so that `eth1` also selects `eth10`, and knows no labels of addresses,
    # such as `eth0:1`.
    return {"GLOO_SOCKET_IFNAME": found, "NCCL_SOCKET_IFNAME": f"={found.partition(':')[0]}"}
