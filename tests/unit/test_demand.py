"""What an autoscaler is asked to start for waiting work, on a cluster with invented placement groups and nodes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from moedisco_ray.core.config import LowMemoryPool
from moedisco_ray.execution.ray import ray_internals
from moedisco_ray.execution.ray.autoscaling import boot_times
from moedisco_ray.execution.ray.autoscaling import demand as module
from moedisco_ray.execution.ray.autoscaling.demand import Demand
from moedisco_ray.policies.arrival import ASSUMED_BOOT

TYPES = [
    {"name": "a", "resource": "a", "memory_gb": 9, "price_per_hour": 1, "speed": 1},
    {"name": "b", "resource": "b", "memory_gb": 9, "price_per_hour": 2, "speed": 1},
]
KINDS = {kind.key: kind for kind in LowMemoryPool.model_validate({"types": TYPES}).node_types}
A, B = KINDS


@dataclasses.dataclass
class Cluster:
    """Its groups by id: the tag of each, and whether it holds its slot; and how many nodes there are of each tag."""

    now: float = 0.0
    groups: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    nodes: list[str] = dataclasses.field(default_factory=list)
    kept: dict[str, bytes] = dataclasses.field(default_factory=dict)
    names: set[str] = dataclasses.field(default_factory=set)

    def boots(self, tag: str) -> list[float]:
        return list(json.loads(self.kept[f"boots/{tag}"]))

    def asked(self) -> dict[str, int]:
        tags = [tag for tag, _ in self.groups.values()]
        return {tag: tags.count(tag) for tag in sorted(set(tags))}

    def comes(self, tag: str) -> None:
        self.nodes.append(tag)
        next(group for group in self.groups.values() if group[0] == tag and not group[1])[1] = True


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    there, numbers = Cluster(), itertools.count()

    def group(bundles: list[dict[str, float]], name: str, bundle_label_selector: list[dict[str, str]]) -> Any:
        [[tag]], [labels] = bundles, bundle_label_selector
        assert not labels
        assert name not in there.names  # of groups that are gone, too: Ray takes its time to remove them
        there.names.add(name)
        key = f"{next(numbers)}"
        there.groups[key] = [tag, False]
        return SimpleNamespace(id=SimpleNamespace(hex=lambda: key))

    monkeypatch.setattr(module, "placement_group", group)
    monkeypatch.setattr(module, "remove_placement_group", lambda group: there.groups.pop(group.id.hex()))
    monkeypatch.setattr(
        module,
        "placement_group_table",
        lambda: {key: {"state": "CREATED" if holds else "PENDING"} for key, (_, holds) in there.groups.items()},
    )
    monkeypatch.setattr(
        boot_times.ray,
        "nodes",
        lambda: [{"NodeID": str(i), "Alive": True, "Resources": {tag: 1.0}} for i, tag in enumerate(there.nodes)],
    )
    monkeypatch.setattr(ray_internals, "kv_get", lambda key, _namespace: there.kept.get(key))
    monkeypatch.setattr(ray_internals, "kv_put", lambda key, value, _namespace: there.kept.update({key: value}))
    return there


def test_a_slot_is_asked_for_for_each_that_waits_and_none_is_kept(cluster: Cluster) -> None:
    demand = Demand(KINDS, "run", lambda: cluster.now)
    demand.request({A: 3})
    demand.request({A: 3})
    assert (cluster.asked(), len(cluster.names)) == ({"a": 3}, 3)
    cluster.now = 40.0
    cluster.comes("a")
    demand.request({A: 2})  # one of them has begun there
    assert cluster.asked() == {"a": 2}
    assert not any(holds for _, holds in cluster.groups.values())
    assert cluster.boots("a") == [40.0]
    demand.request({B: 1})
    assert cluster.asked() == {"b": 1}
    demand.request({})
    assert cluster.asked() == {}


def test_slots_that_came_are_released_and_known_to_be_free_before_trainings_ask_for_them(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[tuple[str, int, dict[str, int]]] = []

    @contextlib.contextmanager
    def freeing(tag: str, slots: int) -> Iterator[None]:
        yield
        freed.append((tag, slots, cluster.asked()))

    monkeypatch.setattr(module.session, "freeing", freeing)
    demand = Demand(KINDS, "run", lambda: cluster.now)
    demand.request({A: 3, B: 1})
    demand.hand_over()
    assert freed == []
    cluster.comes("a")
    cluster.comes("a")
    demand.hand_over()
    assert freed == [("a", 2, {"a": 1, "b": 1})]
    demand.request({A: 1, B: 1})
    assert cluster.asked() == {"a": 1, "b": 1}
    assert len(cluster.names) == 4  # nothing was asked for again


def test_each_node_is_timed_from_when_its_slot_was_asked_for(cluster: Cluster) -> None:
    demand = Demand(KINDS, "run", lambda: cluster.now)
    demand.request({A: 1})
    cluster.now = 30.0
    demand.request({A: 2})
    cluster.now = 50.0
    cluster.comes("a")
    demand.request({A: 1})
    cluster.now = 90.0
    cluster.comes("a")
    demand.request({})
    assert cluster.boots("a") == [50.0, 60.0]


def test_a_type_that_does_not_come_gives_way_for_a_while(cluster: Cluster) -> None:
    demand = Demand(KINDS, "run", lambda: cluster.now)
    demand.request({A: 2})
    cluster.now = 1.9 * ASSUMED_BOOT
    cluster.comes("a")
    demand.request({A: 1})
    cluster.now += 2 * ASSUMED_BOOT
    demand.request({A: 1})  # the newest of them came that long ago, and no longer
    assert demand.absent == []
    boot = demand.boot_seconds
    cluster.now += 2 * boot + 1
    demand.request({A: 1})
    assert demand.absent == [A]
    cluster.now += module.ABSENT_SECONDS
    assert demand.absent == []
