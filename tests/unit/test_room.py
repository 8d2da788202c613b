"""How many workers fit on the nodes that Ray reports."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import HighMemoryPool, LowMemoryPool, RunConfig, check_config, put
from moedisco_ray.core.errors import PoolError
from moedisco_ray.execution.ray import session

NODES = {
    "stays": {"CPU": 4.0, "GPU": 2.0, "low_mem_gpu": 3.0},
    "leaves": {"CPU": 4.0, "GPU": 4.0, "low_mem_gpu": 4.0, "high_mem_gpu": 1.0},
}


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Two nodes with nothing at work; returns those that are about to be taken away, and when."""
    leaving = {"leaves": 0}
    gone = {"NodeID": "gone", "Alive": False, "Resources": {}}
    monkeypatch.setattr(
        ray,
        "nodes",
        lambda: [gone, *({"NodeID": node, "Alive": True, "Resources": resources} for node, resources in NODES.items())],
    )
    monkeypatch.setattr(
        ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 6.0, "low_mem_gpu": 7.0, "high_mem_gpu": 1.0}
    )
    monkeypatch.setattr(session.ray_internals, "available_resources_per_node", lambda: NODES)
    monkeypatch.setattr(session.ray_internals, "draining_nodes", lambda: leaving)
    return leaving


def test_a_node_that_is_about_to_be_taken_away_has_no_room(cluster: dict[str, int]) -> None:
    pool = LowMemoryPool(max_workers=8)
    bundle = Placement(pool, 1, 0).bundle
    assert (session.slots(pool), session.room(pool), session.free_workers(bundle)) == (7, 3, 3)
    assert session.room(HighMemoryPool()) == 0
    cluster.clear()
    assert (session.slots(pool), session.room(pool), session.free_workers(bundle)) == (7, 7, 7)
    assert session.room(HighMemoryPool()) == 1


def test_a_slot_is_a_gpu_too() -> None:
    pool = LowMemoryPool(gpu=1, max_workers=8)
    assert (session.slots(pool), session.room(pool), session.free_workers(Placement(pool, 1, 0).bundle)) == (6, 2, 2)


@pytest.mark.parametrize(("others", "waited"), [(0, 0.4), (5, session.FREE_SECONDS)])
def test_freed_slots_are_waited_for_until_the_autoscaler_knows_them_unless_others_take_them(
    cluster: dict[str, int], monkeypatch: pytest.MonkeyPatch, others: int, waited: float
) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        cluster.clear() if now > 0.35 and not others else None  # Ray has heard of the freed slots

    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    with session.freeing("low_mem_gpu", 4):  # next to the three that are free
        assert now == 0
    assert now == pytest.approx(waited + session.VIEW_SECONDS, abs=0.15)
    with session.freeing("low_mem_gpu", 0):
        before = now
    assert now == before


def test_a_run_waits_for_a_node_and_says_how_to_bring_one(config: RunConfig) -> None:
    assert session.check_pools(config) == []
    [message] = session.check_pools(put_in(config, "pools.high_memory.workers", 4))
    assert message.startswith(
        "pools.high_memory.workers: the run needs 4 high_mem_gpu at once, and this Ray cluster has 1: "
    )
    [message] = session.check_pools(put_in(config, "pools.low_memory.resource", "a_tag"))
    assert message.startswith(
        "pools.low_memory.resource: the run needs 1 a_tag, and this Ray cluster has no node with it: "
    )
    assert message.endswith("(`ray start --address=HEAD:6379 --resources='{\"a_tag\": 1}'`)")


def test_what_an_autoscaler_never_brings_is_refused_at_once(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, int] = {"CPU": 64, "high_mem_gpu": 4, "b_tag": 1}
    monkeypatch.setattr(session, "autoscales", lambda: True)
    monkeypatch.setattr(session.ray_internals, "max_cluster_resources", lambda: limits)
    four = put_in(config, "pools.high_memory.workers", 4)
    assert (session.check_pools(four), session.max_slots(four.pools.high_memory)) == ([], 4)
    with pytest.raises(
        PoolError, match=r"^pools\.high_memory\.workers: 5: the gang needs 5 high_mem_gpu .* brings 4 at most"
    ):
        session.check_pools(put_in(config, "pools.high_memory.workers", 5))
    with pytest.raises(
        PoolError, match=r"^pools\.low_memory\.resource: 'a_tag': no node type of this Ray cluster offers it"
    ):
        session.check_pools(put_in(config, "pools.low_memory.resource", "a_tag"))
    assert session.check_pools(put_in(config, "pools.low_memory.resource", "b_tag")) == []
    limits.clear()  # an autoscaler that does not say what it may bring
    assert session.check_pools(put_in(config, "pools.low_memory.resource", "a_tag")) == []


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return check_config({"name": "waits", "output": str(tmp_path), "corpus": {"sources": [{"path": "embedded"}]}})


def put_in(config: RunConfig, path: str, value: Any) -> RunConfig:
    raw = config.model_dump(mode="json")
    put(raw, path, value)
    return check_config(raw)
