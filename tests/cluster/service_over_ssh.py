"""What is asked of a service that lives on a host, from outside."""

from __future__ import annotations


def client_answers(client):
    """Whether the service is there."""
    try:
        client.pools()
    except Exception:  # noqa: BLE001 - whatever it is, it is not there yet
        return False
    return True


def slots(client):
    """Workers that each pool has room for now."""
    return {pool.resource: pool.slots for pool in client.pools().items}
