"""The document of what was measured: where it is kept, how old it may be, and which slots a pool has."""

from __future__ import annotations

from pathlib import Path

import pytest

from moedisco_ray.core.config import HighMemoryPool
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.measurements import (
    MOST_AGE,
    THIS_MACHINE,
    Check,
    Measurements,
    NetworkRecord,
    SlotRecord,
    SpeedTrial,
    machine_notes,
    measurements_path,
    place_of,
    store_measurements,
    stored_measurements,
)

CARDS = HighMemoryPool(resource="cards", gpu=1, memory_gb=24, price_per_hour=1, speed=1, workers=2)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDISCO_CACHE_DIR", str(tmp_path))


def slot(resource: str | None, flops: float, *, free: int = 20 << 30, card: str | None = "NVIDIA L4") -> SlotRecord:
    speed = SpeedTrial(stage="finetune", experts=8, tokens_per_second=1.0, flops_per_second=flops)
    return SlotRecord(
        name="a", node="a", device="cuda:0", resource=resource, kind="L4", card=card, free_bytes=free, speed=speed
    )


def test_each_place_keeps_its_newest_measurements() -> None:
    assert stored_measurements("a:6379") is None
    for moment in (100.0, 200.0):
        store_measurements(Measurements(place="a:6379", measured_at=moment))
    store_measurements(Measurements(place=THIS_MACHINE, measured_at=150.0))
    found = stored_measurements("a:6379", now=300.0)
    assert found is not None
    assert found.measured_at == 200.0
    assert (place_of({"RAY_ADDRESS": "a:6379"}), place_of({})) == ("a:6379", THIS_MACHINE)


def test_old_measurements_are_not_used() -> None:
    store_measurements(Measurements(place="a", measured_at=0.0))
    assert stored_measurements("a", now=MOST_AGE) is not None
    assert stored_measurements("a", now=MOST_AGE + 1) is None


def test_a_file_that_cannot_be_read_is_named() -> None:
    path = store_measurements(Measurements(place="a", measured_at=0.0))
    path.write_text('{"place": 7}')
    with pytest.raises(ConfigError, match=r"^measurements: .*json.*run `moedisco doctor` again"):
        stored_measurements("a")
    assert measurements_path("a") == path


@pytest.mark.parametrize(
    ("seconds", "age"), [(3, "3 s ago"), (200, "3 min ago"), (2 * 3600, "2 h ago"), (3 * 86_400, "3 days ago")]
)
def test_an_age_has_one_unit(seconds: float, age: str) -> None:
    assert Measurements(place="a", measured_at=50.0).age(50.0 + seconds) == age


def test_a_pool_has_the_slots_with_its_tag_and_its_kind_of_device() -> None:
    found = Measurements(
        place="a",
        measured_at=0.0,
        slots=[
            slot("cards", 1e12),
            slot("cards", 3e12, free=18 << 30),
            slot("others", 9e12, free=1 << 30),
            slot("cards", 9e12, card=None),
        ],
        networks=[
            NetworkRecord(pool="p", resource=tag, backend="nccl", scope="between", workers=2, all_reduce=rate)
            for tag, rate in (("cards", 2e9), ("cards", 1e9), ("others", 1e8))
        ],
    )
    assert found.flops(CARDS, 8) == 2e12
    assert found.flops(CARDS, 1) is None  # only a model with several experts was measured
    assert found.free_gib(CARDS) == 18
    assert found.exchange(CARDS, "between") == 1e9
    assert found.exchange(CARDS, "within") is None


def test_a_report_says_what_was_measured_by_kind_of_card() -> None:
    slow = Check(part="system", name="driver", state="warning", found="535")
    speed = SpeedTrial(stage="submodels", experts=1, tokens_per_second=1.0, flops_per_second=4e13, mfu=0.33)
    slots = [
        slot("cards", 1e12).model_copy(update={"name": name, "speed": speed, "checks": [slow]}) for name in ("a", "b")
    ]
    [note] = machine_notes(Measurements(place="a", measured_at=0.0, slots=[*slots, slot("cpu", 1e9, card=None)]))
    assert note.words == (
        "measured on 1970-01-01: 2 x L4, 20.0 GiB free, 40 TFLOP/s in two layers of submodels (33% MFU); driver: 535"
    )
    assert (note.tflops, note.problems) == ({"submodels": 40.0}, ["driver: 535"])


def test_on_one_machine_every_card_serves_every_pool_that_names_no_other() -> None:
    found = Measurements(place="a", measured_at=0.0, slots=[slot(None, 1e12)])
    assert found.flops(CARDS, 8) == 1e12
    assert found.flops(CARDS.model_copy(update={"card": "L4"}), 8) == 1e12
    assert found.flops(CARDS.model_copy(update={"card": "H100"}), 8) is None
