"""An examination from its slots to the exit code, with slots in this process, and what a plan takes from it."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moedisco_ray.cli import doctor as command
from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.config.yaml_text import parse_yaml
from moedisco_ray.core.records.measurements import (
    THIS_MACHINE,
    Check,
    Copies,
    Measurements,
    NetworkRecord,
    SlotRecord,
    SpeedTrial,
    store_measurements,
)
from moedisco_ray.execution.doctor import examination, here, slot
from moedisco_ray.execution.doctor.examination import examine_slots, network_check
from moedisco_ray.execution.doctor.slot import SlotPlace, examine
from moedisco_ray.execution.doctor.storage import storage_speed
from moedisco_ray.execution.doctor.work import Work, work_of
from moedisco_ray.plan import build_plan
from moedisco_ray.plan.measured_machines import with_measurements
from moedisco_ray.plan.speed import Machine
from moedisco_ray.training.examination.exchanges import Exchange


def demo(**pools: Any) -> RunConfig:
    raw = parse_yaml(preset_text("demo"))
    for name, settings in pools.items():
        raw["pools"][name] |= settings
    raw["submodels"]["optimizer"]["batch_tokens"] = 128
    return check_config(raw)


class Inline:
    """A slot whose process is this one."""

    brief = False

    def __init__(self, work: Work, place: SlotPlace, number: int = 0) -> None:
        self.work, self.place = work.slots[number], place

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function())
        except RuntimeError as error:
            done.set_exception(error)
        return done


def ignore(*_shown: object) -> None:
    pass


def record(node: str, card: str, pool: str = "low_memory") -> SlotRecord:
    return SlotRecord(
        name=f"{node}, GPU {card}",
        node=node,
        device="cuda:0",
        pool=pool,
        resource="low_mem_gpu",
        kind="L4",
        card="NVIDIA L4",
        copies=Copies(to_card=1e10, from_card=1e10, both=1e10),
    )


def test_a_slot_without_a_card_makes_every_part_that_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(slot._SPEED_SECONDS, "cpu", 0.0)
    monkeypatch.setitem(slot._HOST_BYTES, "cpu", 1 << 20)
    found = examine(work_of(demo()).slots[0], SlotPlace("cpu"))
    assert {each.part for each in found.checks} == {"system", "kernels", "memory", "speed", "resume"}
    assert {each.state for each in found.checks} == {"ok"}
    assert found.speed is not None
    assert (found.speed.stage, found.speed.experts) == ("submodels", 1)
    assert found.memory is not None
    assert (found.card, found.copies, found.pool) == (None, None, "low_memory")


def test_a_card_that_torch_cannot_use_ends_its_examination_with_the_remedy() -> None:
    work = work_of(demo(low_memory={"gpu": 1}))
    found = examine(work.slots[0], SlotPlace("cuda:0", "3", "10.0.0.7", "low_mem_gpu"))
    assert [each.state for each in found.checks if each.name == "card"] == ["failed"]
    assert "torch cannot use card 3 of node" in found.checks[0].found
    assert "pools.low_memory.gpu=0" in str(found.checks[0].remedy)
    assert {each.part for each in found.checks} == {"system"}


def test_a_trial_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)

    def broken(*_given: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(slot, "try_kernels", broken)
    monkeypatch.setattr(slot, "try_speed", broken)
    monkeypatch.setattr(slot, "host_memory_speed", lambda _bytes: 1e9)
    found = examine(work_of(demo()).slots[0], SlotPlace("cpu"))
    failed = [(each.part, each.found) for each in found.checks if each.state == "failed"]
    assert failed == [(part, "CUDA error: an illegal memory access") for part in ("kernels", "speed")]
    assert found.checks[-1].part == "resume"


def test_cards_of_one_node_copy_at_once_and_workers_exchange_once_per_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_of(demo(low_memory={"gpu": 1}, high_memory={"gpu": 1}))
    places = [SlotPlace("cuda:0", card, node) for node, card in (("a", "0"), ("a", "1"), ("b", "0"))]

    def look(_work, place, *, brief):
        assert not brief
        return record(str(place.address), place.card)

    monkeypatch.setattr(examination, "examine", look)
    monkeypatch.setattr(examination, "card_while_all_copy", lambda _place: 5e9)
    met: list[tuple[int, tuple[str, ...]]] = []

    def exchange(meeting, rank, place):
        met.append((rank, meeting.nodes))
        return "eth0", [Exchange("nccl", "between", 2, all_reduce=1e9, all_to_all=2e9)] if rank != 1 else []

    monkeypatch.setattr(examination, "exchange", exchange)
    stored = []
    monkeypatch.setattr(
        examination, "storage_speed", lambda _where, size, _field, node: stored.append((node, size)) or broken(node)
    )

    def broken(_node):
        raise RuntimeError("no such bucket")

    shown: list[str] = []
    found = examine_slots([Inline(work, each) for each in places], work, "a:6379", lambda name, _: shown.append(name))
    assert [None if each.copies is None else each.copies.at_once for each in found.slots] == [5e9, 5e9, None]
    assert met == [(0, ("a", "a", "b")), (1, ("a", "a", "b")), (2, ("a", "a", "b"))]
    [network] = found.networks
    assert (network.interface, network.all_reduce, network.resource) == ("eth0", 1e9, None)
    assert [node for node, _ in stored] == ["b", "a"]
    assert [each.found for each in found.failures] == ["b: no such bucket", "a: no such bucket"]
    assert {each.name for each in found.slots[0].checks} == {"clock"}
    assert len(shown) == 5


def test_a_card_that_fails_while_all_copy_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: the doctor ended with its error, and showed nothing that it had measured."""
    work = work_of(demo(low_memory={"gpu": 1}))

    def copy(place: SlotPlace) -> float:
        if place.card == "1":
            raise RuntimeError("CUDA error: the card fell off the bus")
        return 5e9

    monkeypatch.setattr(examination, "examine", lambda _work, place, **_: record(str(place.address), place.card))
    monkeypatch.setattr(examination, "card_while_all_copy", copy)
    monkeypatch.setattr(examination, "exchange", lambda *_: ("eth0", []))
    monkeypatch.setattr(examination, "_MOST_NODES", 0)
    found = examine_slots([Inline(work, SlotPlace("cuda:0", card, "a")) for card in "01"], work, "a:6379", ignore)
    assert [each.copies.at_once for each in found.slots if each.copies is not None] == [5e9, None]
    assert [each.found for each in found.failures] == ["a, GPU 1: CUDA error: the card fell off the bus"]


def test_a_process_that_ends_is_a_failed_slot() -> None:
    work = work_of(demo())

    def die(*_given: object, **_settings: object) -> None:
        raise RuntimeError("the process ended")

    dead = Inline(work, SlotPlace("cpu", address="10.0.0.9"))
    dead.call = lambda _function: Inline.call(dead, die)  # type: ignore[method-assign]
    found = examine_slots([dead], work, "a", ignore)
    assert [(each.name, each.state, each.found) for each in found.failures] == [
        ("process", "failed", "the process ended")
    ]
    assert (found.networks, found.storages) == ([], [])


def test_a_slow_network_is_named_with_the_setting() -> None:
    [low, _] = work_of(demo(low_memory={"gpu": 1, "network": 25})).slots
    slow = NetworkRecord(pool="low_memory", backend="nccl", scope="between", workers=2, all_reduce=1.25e8)
    assert network_check(slow, low).state == "warning"
    assert "pools.low_memory.network=1" in str(network_check(slow, low).remedy)
    for fine in ({"all_reduce": 3e9}, {"scope": "within"}, {"backend": "gloo"}):
        assert network_check(slow.model_copy(update=fine), low).state == "ok"


def test_a_folder_that_does_not_exist_yet_is_measured_where_it_will_be_made(tmp_path: Path) -> None:
    found = storage_speed(tmp_path / "runs" / "new", 1 << 20, "output", "a")
    assert found.write > 0
    assert found.read > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [True, False])
def test_the_command_ends_with_code_2_where_a_check_failed(failing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    state = "failed" if failing else "warning"
    check = Check(part="system", name="driver", state=state, found="535", remedy="install 580")
    result = Measurements(place=THIS_MACHINE, measured_at=0.0, checks=[check])

    def examined(_config, _work, show):
        show("node-1, GPU 0", [check])
        return result

    monkeypatch.setattr(here, "examine_here", examined)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == (2 if failing else 0)
    assert "system   driver: 535; install 580" in done.output
    in_json = CliRunner().invoke(app, ["doctor", "--json"])
    assert json.loads(in_json.stdout) == json.loads(result.model_dump_json())


def test_the_built_in_configuration_uses_the_cards_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "local_gpus", lambda: 4)
    work = work_of(command._built_in(), configured=False)
    assert [each.pool.gpu for each in work.slots] == [1, 1]
    assert [each.wanted.path for each in work.slots] == ["", ""]


def test_cards_that_are_not_there_are_a_failed_check() -> None:
    config = demo(low_memory={"gpu": 1}, high_memory={"gpu": 1})
    found = here.examine_here(config, work_of(config), ignore, gpus=0)
    assert [each.name for each in found.failures] == ["pools.low_memory.gpu", "pools.high_memory.gpu"]


@pytest.mark.slow
def test_the_command_examines_a_machine_without_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    found = Measurements.model_validate_json(done.stdout)
    assert [each.pool for each in found.slots] == [None] * 3
    [network] = found.networks
    assert (network.backend, network.scope, network.workers) == ("gloo", "within", 2)
    assert found.storages[0].write > 0


def measured(config: RunConfig, *, age: float = 200.0, flops: float = 5e13) -> Measurements:
    trials = [
        SpeedTrial(stage="submodels", experts=1, tokens_per_second=1, flops_per_second=flops),
        SpeedTrial(stage="finetune", experts=4, tokens_per_second=1, flops_per_second=flops / 2),
    ]
    resources = (config.pools.low_memory.resource, config.pools.high_memory.resource)
    networks = [
        NetworkRecord(pool="p", resource=resources[1], backend="nccl", scope=scope, workers=2, all_reduce=rate)
        for scope, rate in (("between", 1.25e8), ("within", 9e9))
    ]
    return Measurements(
        place=THIS_MACHINE,
        measured_at=time.time() - age,
        slots=[
            record("a", "0").model_copy(update={"resource": resource, "speed": speed})
            for resource, speed in zip(resources, trials, strict=True)
        ],
        networks=networks,
    )


def test_a_plan_uses_the_measured_speed_and_network() -> None:
    config = demo(low_memory={"gpu": 1, "card": "L4"}, high_memory={"gpu": 1, "card": "H100", "workers": 2})
    now, words = with_measurements(config, measured(config), time.time())
    assert now.pools.low_memory.flops(1) == pytest.approx(5e13)
    assert now.pools.high_memory.flops(4) == pytest.approx(2.5e13)
    assert (now.pools.low_memory.network, now.pools.high_memory.network) == (10.0, 1.0)
    plan = build_plan(now, Machine(measured=words))
    assert [each.source for each in plan.speeds] == [
        "measured by moedisco doctor 3 min ago: 50 TFLOP/s per worker, 25 with several experts per layer",
        "measured by moedisco doctor 3 min ago: 41.7 TFLOP/s per worker, 25 with several experts per layer",
    ]


def test_a_plan_uses_less_memory_where_less_is_free() -> None:
    config = demo(low_memory={"gpu": 1}, high_memory={"gpu": 1})
    found = measured(config)
    slots = [
        each.model_copy(update={"free_bytes": free << 30}) for each, free in zip(found.slots, (3, 900), strict=True)
    ]
    now, words = with_measurements(config, found.model_copy(update={"slots": slots}), time.time())
    assert (now.pools.low_memory.memory_gb, now.pools.high_memory.memory_gb) == (3, config.pools.high_memory.memory_gb)
    assert words["low_memory"].endswith(", with 3.0 GiB free")


def test_each_node_type_of_a_mixed_pool_has_its_own_measured_speed() -> None:
    types = [
        {"name": name, "resource": name, "memory_gb": 24, "price_per_hour": 1, "speed": 1} for name in ("old", "new")
    ]
    config = demo(low_memory={"gpu": 1, "types": types})
    slots = [
        record("a", "0").model_copy(
            update={
                "resource": "new",
                "speed": SpeedTrial(stage="submodels", experts=1, tokens_per_second=1, flops_per_second=5e13),
            }
        )
    ]
    found = Measurements(place="a", measured_at=0.0, slots=slots)
    now, words = with_measurements(config, found, 1.0)
    assert [each.flops(1) == pytest.approx(5e13) for each in now.pools.low_memory.node_types] == [False, True]
    assert words.keys() == {"low_memory.new"}


def test_the_plan_command_says_when_the_speed_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEDISCO_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    raw = parse_yaml(preset_text("demo"))
    for pool in raw["pools"].values():
        pool["gpu"] = 1
    path = tmp_path / "my.json"
    path.write_text(json.dumps(raw))
    plan = functools.partial(CliRunner().invoke, app, ["plan", str(path), "--json"])
    assert "moedisco doctor" not in plan().stdout
    store_measurements(measured(check_config(raw)))
    sources = [each["source"] for each in json.loads(plan().stdout)["speeds"]]
    assert all(each.startswith("measured by moedisco doctor 3 min ago: ") for each in sources)
