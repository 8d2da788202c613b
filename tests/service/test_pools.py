from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.ray_side.dashboard import Dashboard
from service.ray_side.pools import RayPools

NOW = 1_800_000_000.0
GROUP = "251ebb2612a7f8187a5d8e85103f02000000"


def node(name: str, *, ended: float | None = None, message: str | None = None, **resources: float) -> dict[str, Any]:
    """An element of what Ray 2.60 lists."""
    return {
        "node_id": name,
        "node_ip": "10.0.0.1",
        "is_head_node": False,
        "state": "ALIVE" if ended is None else "DEAD",
        "state_message": message,
        "node_name": "10.0.0.1",
        "labels": {"market": "spot"},
        "start_time_ms": 1,
        "end_time_ms": 0 if ended is None else 1000 * ended,
        "resources_total": {
            "CPU": 4.0,
            "memory": 1e9,
            "object_store_memory": 1e8,
            "node:10.0.0.1": 1.0,
            "accelerator_type:L4": 1.0,
        }
        | resources,
    }


def group(state: str, *bundles: tuple[str, dict[str, float]]) -> dict[str, Any]:
    return {
        "placement_group_id": GROUP,
        "state": state,
        "stats": {},
        "bundles": [{"bundle_id": {}, "node_id": at, "unit_resources": resources} for at, resources in bundles],
    }


class Ray:
    """Answers as a dashboard does."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.groups: list[dict[str, Any]] = []
        self.uses: dict[str, str] = {}
        self.node_type = ""
        self.broken: str | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path == self.broken:
            return httpx.Response(500, text="RpcError")
        if path == "/nodes":
            summary = [
                {"hostname": "vm", "raylet": {"nodeTypeName": self.node_type, "resourcesTotal": {"lowMemGpu": 2.0}}}
            ]
            return httpx.Response(
                200, json={"result": True, "data": {"summary": summary, "nodeLogicalResources": self.uses}}
            )
        listed = {"/api/v0/nodes": self.nodes, "/api/v0/placement_groups": self.groups}[path]
        assert request.url.params["detail"] == "1"
        return httpx.Response(200, json={"result": True, "data": {"result": {"total": len(listed), "result": listed}}})


@pytest.fixture
def ray() -> Ray:
    return Ray()


def pools(ray: Ray) -> RayPools:
    return RayPools(Dashboard("http://ray", Path("/nowhere"), httpx.MockTransport(ray)), clock=lambda: NOW)


def test_a_pool_is_every_node_that_carries_its_tag(ray):
    ray.nodes = [
        node("a", low_mem_gpu=2, GPU=2),
        node("b", low_mem_gpu=1),
        node("c", high_mem_gpu=8, GPU=8),
        node("head"),
    ]
    reserved = "1.0/2.0 low_mem_gpu (1.0 used of 2.0 reserved in placement groups)"
    ray.uses = {"a": f"1.0/4.0 CPU\n{reserved}\n0B/20.53GiB memory", "b": "0.0/1.0 low_mem_gpu"}
    high, low = pools(ray).read().items
    assert (low.resource, low.slots, low.free, low.gpus) == ("low_mem_gpu", 3, 1, 2)
    assert (high.resource, high.slots, high.free, high.gpus) == ("high_mem_gpu", 8, 8, 8)
    assert [each.id for each in low.nodes] == ["a", "b"]
    assert low.nodes[0].labels == {"market": "spot"}
    assert low.nodes[0].resources["low_mem_gpu"] == 2
    assert low.price_per_hour is None


def test_what_ray_makes_for_itself_is_no_pool(ray):
    own = {f"low_mem_gpu_group_{GROUP}": 1.0, f"bundle_group_0_{GROUP}": 1000.0, "node:__internal_head__": 1.0}
    ray.nodes = [node("a", low_mem_gpu=1, **own)]
    assert [pool.resource for pool in pools(ray).read().items] == ["low_mem_gpu"]


def test_a_pool_that_is_asked_for_is_there_though_no_node_offers_it(ray):
    [pool] = pools(ray).read(["rare"]).items
    assert (pool.resource, pool.slots, pool.nodes) == ("rare", 0, [])


def test_nodes_that_died_lately_are_lost_and_those_that_were_ended_are_not(ray):
    ray.nodes = [
        node("a", low_mem_gpu=1),
        node("b", ended=NOW - 60, message="Unexpected termination: raylet died", low_mem_gpu=1),
        node("c", ended=NOW - 60, message="Terminated due to preemption", low_mem_gpu=1),
        node("d", ended=NOW - 25 * 3600, message="Unexpected termination", low_mem_gpu=1),
        node("e", ended=NOW - 60, message="Expected termination: drained", low_mem_gpu=1),
        node("f", ended=NOW - 60, message="Terminated due to idle (no Ray activity)", low_mem_gpu=1),
    ]
    [pool] = pools(ray).read().items
    assert (pool.slots, pool.lost) == (1, 2)
    assert [(each.id, each.alive) for each in pool.nodes] == [("a", True), ("b", False), ("c", False)]


def test_workers_that_no_node_carries_yet_are_pending(ray):
    slot = {"CPU": 1.0, "low_mem_gpu": 1.0}
    ray.groups = [
        group("CREATED", ("a", slot)),
        group("PENDING", ("", slot), ("", slot)),
        group("RESCHEDULING", ("a", slot), ("", slot)),
        group("REMOVED", ("", slot)),
    ]
    [pool] = pools(ray).read(["low_mem_gpu"]).items
    assert pool.pending == 3


@pytest.mark.parametrize("path", ["/nodes", "/api/v0/nodes", "/api/v0/placement_groups"])
def test_where_ray_does_not_answer_there_is_nothing(ray, path):
    ray.broken = path
    there = pools(ray).read(["low_mem_gpu"])
    assert (there.connected, there.items) == (False, [])


def test_callers_without_a_token_share_an_answer_and_do_not_wait_for_each_other(ray, monkeypatch):
    """`/readyz` is open to everyone, and each of its requests holds a thread."""
    now, slow, asked, go_on = [0.0], [False], threading.Semaphore(0), threading.Event()
    monkeypatch.setattr("service.ray_side.pools.time.monotonic", lambda: now[0])

    def answer(request: httpx.Request) -> httpx.Response:
        asked.release()
        if slow[0]:
            assert go_on.wait(20)
        return ray(request)

    shared = RayPools(Dashboard("http://ray", Path("/nowhere"), httpx.MockTransport(answer)))
    assert shared.read().connected
    assert shared.read().connected
    assert [asked.acquire(blocking=False) for _ in range(4)] == [True, True, True, False]
    now[0], slow[0], ray.broken = 2.0, True, "/nodes"
    first = threading.Thread(target=shared.read)
    first.start()
    assert asked.acquire(timeout=20)
    assert shared.read().connected  # while the first one waits for Ray
    go_on.set()
    first.join(20)
    assert not shared.read().connected


def test_an_answer_of_another_form_is_none(ray):
    ray.nodes = [{"node_id": "a"}]
    assert not pools(ray).read().connected


def test_a_cluster_that_names_its_nodes_types_has_an_autoscaler(ray):
    assert not pools(ray).grows()
    ray.node_type = "low_memory_spot"
    assert pools(ray).grows()
    ray.broken = "/nodes"
    assert not pools(ray).grows()
