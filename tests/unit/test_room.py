"""What there is room for, on nodes as Ray tells of them."""

from __future__ import annotations

import pytest
import ray

from moedisco_ray.config import HighMemoryPool, LowMemoryPool
from moedisco_ray.on_ray import session
from moedisco_ray.shell import Placement

NODES = {
    "stays": {"CPU": 4.0, "GPU": 2.0, "low_mem_gpu": 3.0},
    "leaves": {"CPU": 4.0, "GPU": 4.0, "low_mem_gpu": 4.0, "high_mem_gpu": 1.0},
}


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Two nodes with nothing at work; returns those that are about to be taken away, and when."""
    leaving = {"leaves": 0}
    gone = {"NodeID": "gone", "Alive": False, "Resources": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [
        gone, *({"NodeID": node, "Alive": True, "Resources": resources} for node, resources in NODES.items())])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 6.0, "low_mem_gpu": 7.0, "high_mem_gpu": 1.0})
    monkeypatch.setattr(session.state, "available_resources_per_node", lambda: NODES)
    monkeypatch.setattr(session.state.state, "get_draining_nodes", lambda: leaving)
    return leaving


def test_a_node_that_is_about_to_be_taken_away_has_no_room(cluster: dict[str, int]) -> None:
    pool = LowMemoryPool(max_workers=8)
    bundle = Placement(pool, 1, 0).bundle
    assert (session.slots(pool), session.room(pool, 1), session.there(pool, 1), session.free(bundle)) == (7, 3, 3, 3)
    assert session.room(HighMemoryPool(), 1) == 0
    cluster.clear()
    assert (session.slots(pool), session.room(pool, 1), session.there(pool, 1), session.free(bundle)) == (7, 7, 7, 7)
    assert session.room(HighMemoryPool(), 1) == 1


def test_a_slot_is_a_gpu_too() -> None:
    pool = LowMemoryPool(gpu=1, max_workers=8)
    assert (session.slots(pool), session.room(pool, 1), session.free(Placement(pool, 1, 0).bundle)) == (6, 2, 2)
    assert session.room(pool, 2) == 1
