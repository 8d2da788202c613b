"""Drain a Ray node that will end: it takes no more work, and Ray Train is notified.

As a program, with the arguments GCS_ADDRESS NODE_ID DEADLINE_MS REASON, it drains one node.
"""

from __future__ import annotations

import sys

import ray
from ray.exceptions import RpcError

from moedisco_ray.execution.ray.ray_internals import DRAIN_NODE_REASON_PREEMPTION, GcsClient

_TIMEOUT_S = 5


def drain(gcs_address: str, node_id: str, deadline_ms: int, reason: str) -> bool:
    """Drain a node that the cloud will take away; Ray does not end the node at the deadline.

    Args:
        gcs_address: HOST:PORT of the Ray cluster's control store.
        node_id: The node's id (hexadecimal).
        deadline_ms: Time at which the node will end, in milliseconds since the epoch.
        reason: Text for Ray's log.

    Returns:
        False if the node was draining already, with this deadline or an earlier one.

    Raises:
        ValueError: The Ray cluster has no such node, or refuses.
        RpcError: The Ray cluster does not respond.
    """
    client = GcsClient(address=gcs_address)
    # For a node that it does not know, Ray accepts the drain and does nothing.
    if ray.NodeID.from_hex(node_id) not in client.get_all_node_info(timeout=_TIMEOUT_S):
        raise ValueError(f"has no node {node_id} yet")
    known = {_hex(node): deadline for node, deadline in client.get_draining_nodes(timeout=_TIMEOUT_S).items()}
    if 0 < known.get(node_id, 0) <= deadline_ms:
        return False
    accepted, refusal = client.drain_node(
        node_id, DRAIN_NODE_REASON_PREEMPTION, reason, deadline_ms, timeout=_TIMEOUT_S
    )
    if not accepted:
        raise ValueError(f"refuses to drain node {node_id}: {refusal}")
    return True


def main(arguments: list[str]) -> str | None:
    """Run the program; returns an error message, if any."""
    gcs_address, node_id, deadline_ms, reason = arguments
    try:
        drain(gcs_address, node_id, int(deadline_ms), reason)
    except (ValueError, RpcError) as error:
        return str(error)
    return None


def _hex(node: object) -> str:
    return node.hex() if isinstance(node, ray.NodeID | bytes) else str(node)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
