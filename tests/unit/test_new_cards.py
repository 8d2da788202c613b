"""Which cards a run examines before it begins, and what it keeps of earlier measurements."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from moedisco_ray.core.config import LowMemoryPool
from moedisco_ray.core.records.measurements import Check, Measurements, NetworkRecord, SlotRecord
from moedisco_ray.execution.ray.new_cards import first_of_each_kind, tried_kinds, with_new

SYSTEM = Check(part="system", name="card", state="ok", found="L4")
KERNEL = Check(part="kernels", name="loss in tiles", state="ok", found="0")
WORK: Any = SimpleNamespace(pool=LowMemoryPool(gpu=1))


def slot(name: str, kind: str = "L4", *checks: Check, **fields: Any) -> SlotRecord:
    settings = {"card": kind, "pool": "low_memory", "resource": "low_mem_gpu"} | fields
    return SlotRecord(name=name, node=name, device="cuda:0", kind=kind, checks=[SYSTEM, *checks], **settings)


def test_one_working_card_of_each_new_kind_is_tried() -> None:
    failed = SYSTEM.model_copy(update={"state": "failed"})
    records = [
        slot("a").model_copy(update={"checks": [failed]}),
        slot("b"),
        slot("c"),
        slot("d", "T4"),
        slot("e", "H100"),
        slot("f", "CPU", card=None),
    ]
    chosen = first_of_each_kind([(object(), record) for record in records], frozenset({"T4"}))  # type: ignore[misc]
    assert {record.name for _, record in chosen} == {"b", "e"}


def test_a_kind_is_known_for_the_pool_for_which_it_was_tried() -> None:
    known = Measurements(
        place="a",
        measured_at=0.0,
        slots=[slot("a", "L4", KERNEL), slot("b", "T4"), slot("c", "H100", KERNEL, pool="x")],
    )
    assert tried_kinds(known, WORK) == {"L4"}
    assert tried_kinds(None, WORK) == frozenset()


def test_measurements_stay_until_a_new_kind_is_tried() -> None:
    network = NetworkRecord(pool="low_memory", backend="nccl", scope="between", workers=2, all_reduce=1e9)
    known = Measurements(place="a", measured_at=5.0, slots=[slot("a", "L4", KERNEL)], networks=[network])
    assert with_new(known, [slot("a"), slot("b")], "a", 9.0) is known
    tried = slot("b", "T4", KERNEL)
    both = with_new(known, [slot("a"), tried], "a", 9.0)
    assert both.slots == [*known.slots, tried]
    assert (both.measured_at, both.networks) == (5.0, [network])
    first = with_new(None, [slot("a")], "a", 9.0)
    assert (first.measured_at, first.slots) == (9.0, [slot("a")])
