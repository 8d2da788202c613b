"""A sub-model that hangs is not waited for, and each goes to the machines that it fits, on a cluster of two nodes."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from second_node import second_node
from small_run import small_config
from waiting import until

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.store.artifacts import read_json, read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.ray import queue, session
from moedisco_ray.execution.ray.backend import train_all
from moedisco_ray.models import differences, open_checkpoint
from moedisco_ray.training import TrainJob

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 128,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}


class Hang:
    """Stops the process of the first unit, once it has passed a step, so that it neither trains nor hears anything."""

    def __init__(self, step: int) -> None:
        self.step, self.unit, self.pid, self.stopped = step, "", 0, False

    def __call__(self, event: Event) -> None:
        if event.type == "unit_started" and not self.unit:
            self.unit, self.pid = str(event.unit), event.data["pid"]
        if (
            event.type == "progress"
            and event.unit == self.unit
            and event.data["step"] >= self.step
            and not self.stopped
        ):
            os.kill(self.pid, signal.SIGSTOP)
            self.stopped = True


@dataclasses.dataclass(frozen=True)
class HeldUp:
    directory: Path
    events: list[Event]
    unit: str
    pid: int


@pytest.fixture(scope="module")
def held_up(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> HeldUp:
    """A run of three sub-models on two slots that needs two of them; the one that started first hangs."""
    config = small_config(
        tmp_path_factory.mktemp("held_up"),
        tokens={"total": 200_000, "finetune_share": 0.4},
        model={"family": "qwen3_moe", "config": SIZES},
        clusters={"count": 3, "vectors": "tfidf_svd"},
        submodels={"optimizer": {"batch_tokens": 1024, "lr": 2e-3}, "quorum": 2},
        pools={"low_memory": {"max_workers": 3}, "high_memory": {"workers": 1}},
    )
    hang = Hang(25)
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queue, "STOP_SECONDS", 1.0)
        try:
            directory = pipeline.run(config, (hang, events.append))
        finally:
            if hang.pid and _alive(hang.pid):
                os.kill(hang.pid, signal.SIGCONT)
    return HeldUp(directory, events, hang.unit, hang.pid)


def test_the_merge_goes_on_with_the_checkpoint_of_one_that_hangs(held_up: HeldUp) -> None:
    manifest = read_manifest(held_up.directory / "submodels")
    assert manifest is not None
    units: list[dict[str, Any]] = manifest.summary["units"]
    assert {unit["name"]: unit["contribution"] for unit in units} == {
        **dict.fromkeys(("submodel-0", "submodel-1", "submodel-2"), "finished"),
        held_up.unit: "checkpoint",
    }
    [number] = [k for k, unit in enumerate(units) if unit["name"] == held_up.unit]
    late = units[number]
    assert late["steps"] >= 10
    assert late["steps"] % 10 == 0
    assert late["steps"] < late["planned_steps"]
    assert late["reason"] == "its time was up"
    assert late["held"]["low_memory"] > 0
    merged = read_manifest(held_up.directory / "merged")
    assert merged is not None
    tokens = [unit["tokens"] for unit in units]
    assert merged.summary["weights"] == pytest.approx([each / sum(tokens) for each in tokens])
    started, merged_from = (
        open_checkpoint(held_up.directory / stage / str(number)) for stage in ("decomposed", "submodels")
    )
    assert differences(started, merged_from)


def test_the_report_and_the_card_say_what_it_contributed(held_up: HeldUp) -> None:
    report = read_json(held_up.directory / "report.json")
    [unfinished] = next(stage["unfinished"] for stage in report["stages"] if stage["name"] == "submodels")
    assert unfinished["name"] == held_up.unit
    said = (
        f"{held_up.unit.capitalize()} is not finished: the merge took its checkpoint of step {unfinished['steps']} of"
    )
    assert said in (held_up.directory / "model" / "README.md").read_text(encoding="utf-8")
    [event] = [event for event in held_up.events if event.type == "unit_let_go"]
    assert (event.unit, event.data["contribution"], event.data["steps"]) == (
        held_up.unit,
        "checkpoint",
        unfinished["steps"],
    )


def test_one_that_is_let_go_leaves_neither_process_nor_slot(held_up: HeldUp) -> None:
    until(lambda: not _alive(held_up.pid))
    until(lambda: ray.available_resources().get("low_mem_gpu") == ray.cluster_resources()["low_mem_gpu"])
    meter = Meter()
    for event in held_up.events:
        meter.update(event)
    assert not meter.open


@pytest.fixture
def roomy_node(ray_cluster: None) -> Iterator[None]:
    """A second node, which alone offers `roomy_gpu`."""
    with second_node("roomy_gpu"):
        yield


def test_each_goes_where_it_fits_for_the_least_money(held_up: HeldUp, roomy_node: None, tmp_path: Path) -> None:
    def job(name: str, micro_batch: int) -> TrainJob:
        optimizer = small_config(tmp_path).submodels.optimizer.model_copy(update={"micro_batch": micro_batch})
        return TrainJob(
            stage="submodels",
            name=name,
            model=held_up.directory / "decomposed" / "0",
            packed_dirs=(held_up.directory / "clusters" / "shards" / "0",),
            output=tmp_path / name / "trained",
            checkpoints=tmp_path / name / "steps",
            steps=3,
            sequence_length=64,
            optimizer=optimizer,
            checkpoint_every=3,
        )

    def pool(small_gb: float) -> Placement:
        return Placement(
            LowMemoryPool.model_validate(
                {
                    "types": [
                        {
                            "name": "small",
                            "resource": "low_mem_gpu",
                            "memory_gb": small_gb,
                            "price_per_hour": 0.1,
                            "speed": 1,
                        },
                        {"name": "roomy", "resource": "roomy_gpu", "memory_gb": 8, "price_per_hour": 1.0, "speed": 1},
                    ]
                }
            ),
            1,
            0,
        )

    jobs = [job("little", 1), job("much", 16)]
    little, much = (pool(1).need(each).memory_gb for each in jobs)
    placement = pool((little + much) / 2)
    events: list[Event] = []
    trained = train_all(jobs, placement, tmp_path / "ray", events.append)
    assert [list(each.held) for each in trained] == [["low_memory.small"], ["low_memory.roomy"]]
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    on = {event.unit: nodes[event.data["node_id"]] for event in events if event.type == "unit_started"}
    assert "roomy_gpu" in on["much"]
    assert "roomy_gpu" not in on["little"]
    # Another driver finds both finished, and starts nothing.
    again: list[Event] = []
    assert [each.result.losses for each in train_all(jobs, placement, tmp_path / "ray", again.append)] == [
        each.result.losses for each in trained
    ]
    assert {event.type for event in again} == {"unit_finished"}


def test_a_mixed_pool_needs_one_type_at_least(ray_cluster: None, tmp_path: Path) -> None:
    def config(*tags: str) -> Any:
        types = [{"name": tag, "resource": tag, "memory_gb": 9, "price_per_hour": 1, "speed": 1} for tag in tags]
        return small_config(tmp_path, pools={"low_memory": {"types": types}})

    assert session.check_pools(config("no_such_tag", "low_mem_gpu")) == []
    elsewhere = small_config(
        tmp_path, finetune={"pool": "low_memory"}, pools={"high_memory": {"resource": "no_such_tag"}}
    )
    assert session.check_pools(elsewhere) == []
    [message] = session.check_pools(config("no_such_tag", "nor_this"))
    assert message.startswith(
        "pools.low_memory.types: the run needs 1 no_such_tag or nor_this, and this Ray cluster has no node"
    )


@pytest.mark.parametrize(
    ("most", "each", "gpu", "cores", "slots"),
    [
        (8, (8,), 0, 2, [2]),
        (8, (8,), 1, 2, [8]),
        (8, (8, 8), 0, 4, [3, 1]),
        (8, (1, 8), 0, 4, [1, 3]),
        (8, (8, 8), 0, 1, [1, 1]),
    ],
)
def test_a_local_machine_shares_its_cores_out(
    most: int, each: tuple[int, ...], gpu: int, cores: int, slots: list[int]
) -> None:
    types = [
        {"name": f"t{i}", "resource": f"t{i}", "memory_gb": 9, "price_per_hour": 1, "speed": 1, "max_workers": count}
        for i, count in enumerate(each)
    ]
    assert (
        session.local_slots(LowMemoryPool.model_validate({"gpu": gpu, "max_workers": most, "types": types}), cores)
        == slots
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
