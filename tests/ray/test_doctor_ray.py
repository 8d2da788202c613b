"""An examination of the slots of a Ray cluster, each through a seat, and the look at cards before a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from small_run import small_config

from moedisco_ray.core.errors import CardError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.measurements import MEASUREMENTS, Measurements
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution.doctor.work import work_of
from moedisco_ray.execution.ray.examined_slots import examine_cluster
from moedisco_ray.execution.ray.new_cards import examine_new_cards
from moedisco_ray.execution.ray.seats import Seats

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("ray_cluster")]


@pytest.mark.slow
def test_every_slot_of_every_pool_is_examined(tmp_path: Path) -> None:
    config = small_config(tmp_path, finetune={"pool": "low_memory"})
    shown: list[str] = []
    address = ray.get_runtime_context().gcs_address
    found = examine_cluster(work_of(config), address, tmp_path / "ray.log", lambda name, _checks: shown.append(name))
    assert found.failures == []
    assert [each.resource for each in found.slots] == ["low_mem_gpu"] * 2
    assert {check.part for check in found.slots[0].checks} == {"system", "kernels", "memory", "speed", "resume"}
    for slot in found.slots:
        assert "clock" in {check.name for check in slot.checks}
    [network] = found.networks
    assert (network.resource, network.scope, network.workers) == ("low_mem_gpu", "within", 2)
    assert network.interface
    assert len(found.storages) == 1
    assert len(shown) == len(found.slots) + len(found.networks) + 1


def test_a_run_without_cards_examines_nothing(tmp_path: Path) -> None:
    events: list[Event] = []
    with Seats("none") as seats:
        examine_new_cards(small_config(tmp_path), seats, events.append, RunStore.of(tmp_path))
    assert events == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.chaos
def test_a_card_that_torch_cannot_use_is_a_warning_before_the_run_begins(
    cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEDISCO_CACHE_DIR", str(tmp_path / "cache"))
    cluster.add_node(num_cpus=1, num_gpus=1, resources={"low_mem_gpu": 1})  # type: ignore[attr-defined]  # Ray's
    cluster.wait_for_nodes()  # type: ignore[attr-defined]  # Ray's
    config = small_config(tmp_path, pools={"low_memory": {"gpu": 1, "max_workers": 1}})
    events: list[Event] = []
    with Seats("one") as seats:
        examine_new_cards(config, seats, events.append, RunStore.of(tmp_path))
    [warning] = [event.data["message"] for event in events if event.type == "warning"]
    assert warning.startswith("pools.low_memory.gpu: 1: torch cannot use card 0 of node")
    assert warning.endswith("; the run continues without this node")
    with pytest.raises(CardError, match="torch cannot use card 0"):
        seats.aside.check(config.pools.low_memory)
    assert [event.type for event in events if event.type != "warning"] == ["workers_held", "workers_released"]
    found = Measurements.model_validate_json((tmp_path / MEASUREMENTS).read_bytes())
    assert [slot.card for slot in found.slots] == [None]
