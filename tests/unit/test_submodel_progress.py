"""Progress towards a quorum, without anything that trains."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool, Optimizer
from moedisco_ray.core.errors import PoolError, TrainingError
from moedisco_ray.execution.submodel_progress import SubmodelProgress
from moedisco_ray.policies.placement import place_all
from moedisco_ray.policies.quorum import ALL, Quorum
from moedisco_ray.training import TrainJob, TrainResult, World
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.checkpoints.checkpoint import Progress

STEPS = 10
RESULT = TrainResult(STEPS, 100, (3.0,) * STEPS, 20.0, 0, finished=True)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def jobs(tmp_path: Path) -> list[TrainJob]:
    return [
        TrainJob(
            stage="submodels",
            name=name,
            model=tmp_path / "start",
            packed_dirs=(),
            output=tmp_path / name / "trained",
            checkpoints=tmp_path / name / "steps",
            steps=STEPS,
            sequence_length=16,
            optimizer=Optimizer(),
            checkpoint_every=5,
        )
        for name in "abc"
    ]


def checkpointed(job: TrainJob, step: int) -> None:
    progress = Progress(step, 10 * step, [3.0] * step, 2.0 * step)
    checkpoint.write(checkpoint.storage_of(job), {"model": {}, "optimizer": {}}, progress, 2, World())


SPEEDS = dict.fromkeys("abc", 1.0)


def test_a_quorum_gives_the_rest_its_time_and_takes_what_they_have(jobs: list[TrainJob], tmp_path: Path) -> None:
    clock = Clock()
    submodel_progress = SubmodelProgress(jobs, Quorum(1, patience=2.0), 1, tmp_path / "submodel_progress.json", clock)
    assert submodel_progress.verdict(SPEEDS).action == "wait"
    clock.now += 30
    submodel_progress.finish("a", RESULT, 1.0)
    # It took 30 s; at its two seconds per step the others are expected to take 20.
    assert submodel_progress.verdict(SPEEDS).seconds == 30
    clock.now += 30
    assert submodel_progress.verdict(SPEEDS).action == "go"
    checkpointed(jobs[1], 5)
    a, b, c = (submodel_progress.trained(job, {"b": {"low_memory": 7.0}}) for job in jobs)
    assert (a.contribution, a.result, a.reason) == ("finished", RESULT, None)
    assert (b.contribution, b.result.steps, b.result.tokens, b.result.finished) == ("checkpoint", 5, 50, False)
    assert (c.contribution, c.result.steps, c.result.tokens, c.reason) == ("seed", 0, 0, "its time was up")
    assert (b.held, b.worker_seconds, c.worker_seconds) == ({"low_memory": 7.0}, 7.0, 0.0)


def test_one_on_a_slow_machine_is_given_the_time_that_such_a_machine_takes(
    jobs: list[TrainJob], tmp_path: Path
) -> None:
    clock = Clock()
    submodel_progress = SubmodelProgress(
        jobs[:2], Quorum(1, patience=1.0), 1, tmp_path / "submodel_progress.json", clock
    )
    clock.now += 20
    submodel_progress.finish("a", RESULT, 0.5)  # two seconds per step
    assert submodel_progress.verdict({"a": 9.0, "b": 0.125}).seconds == pytest.approx(4 * 20 - 20)


def test_the_time_of_a_gang_that_changes_size_is_not_its_worker_seconds(jobs: list[TrainJob], tmp_path: Path) -> None:
    path, held = tmp_path / "submodel_progress.json", 0.0
    for driver in range(2):
        progress, held_here = SubmodelProgress(jobs[:1], ALL, 1, path), 0.0
        for workers in (2, 4):
            progress.workers["a"] = workers
            for _ in range(3):
                held_here += 10.0 * workers
                progress.save(lambda held_here=held_here: {"a": {"high_memory": held_here}}, now=True)
        held += held_here
        trained = progress.trained(jobs[0], {"a": {"high_memory": held_here}})
        assert trained.held == {"high_memory": held}
        assert trained.seconds == pytest.approx(60.0 * (driver + 1))
        assert trained.workers == pytest.approx(3.0)


def test_a_later_driver_decides_from_what_is_there(jobs: list[TrainJob], tmp_path: Path) -> None:
    clock = Clock()
    first = SubmodelProgress(jobs, Quorum(1, patience=1.5), 1, tmp_path / "submodel_progress.json", clock)
    clock.now += 40
    checkpointed(jobs[0], STEPS)
    jobs[0].output.mkdir()
    first.finish("a", RESULT, 1.0)
    first.save(lambda: {"a": {"low_memory.t4": 40.0}, "b": {"low_memory.t4": 39.0}}, now=True)
    clock.now += 86_400  # a day without a driver: no training is late for that
    second = SubmodelProgress(jobs, Quorum(1, patience=1.5), 1, tmp_path / "submodel_progress.json", clock)
    assert list(second.finished) == ["a"]
    assert second.seconds == 40
    assert second.verdict(SPEEDS).seconds == pytest.approx(1.5 * 40 - 40)
    held = {"b": {"low_memory.t4": 1.0, "low_memory.l4": 2.0}}
    assert second.trained(jobs[0], held).held == {"low_memory.t4": 40.0}
    assert second.trained(jobs[1], held).held == {"low_memory.t4": 40.0, "low_memory.l4": 2.0}
    clock.now += 21
    assert second.verdict(SPEEDS).action == "go"


def test_a_checkpoint_of_the_last_step_is_no_model_yet(jobs: list[TrainJob], tmp_path: Path) -> None:
    checkpointed(jobs[0], STEPS)
    submodel_progress = SubmodelProgress(jobs, ALL, 1, tmp_path / "submodel_progress.json")
    assert submodel_progress.finished == {}
    assert submodel_progress.trained(jobs[0], {}).contribution == "checkpoint"


def test_what_gave_up_ends_the_cohort_only_where_the_quorum_is_out_of_reach(
    jobs: list[TrainJob], tmp_path: Path
) -> None:
    submodel_progress = SubmodelProgress(jobs, Quorum(2), 1, tmp_path / "submodel_progress.json")
    submodel_progress.give_up("a", "diverged: loss is nan")
    assert submodel_progress.verdict(SPEEDS).action == "wait"
    assert submodel_progress.trained(jobs[0], {}).reason == "diverged: loss is nan"
    submodel_progress.give_up("c", "failed 4 times")
    with pytest.raises(
        TrainingError, match=r"^2 of 3 can no longer finish: a: diverged: loss is nan; c: failed 4 times$"
    ):
        submodel_progress.verdict(SPEEDS)


def test_without_a_quorum_one_that_gives_up_ends_it(jobs: list[TrainJob], tmp_path: Path) -> None:
    submodel_progress = SubmodelProgress(jobs, ALL, 1, tmp_path / "submodel_progress.json")
    submodel_progress.give_up("b", "failed 4 times")
    with pytest.raises(TrainingError, match=r"^b: failed 4 times$"):
        submodel_progress.verdict(SPEEDS)


@given(
    quorum=st.integers(1, 3), ends=st.lists(st.sampled_from("abc"), unique=True, max_size=3), waited=st.floats(0, 1e4)
)
def test_it_goes_on_only_with_a_quorum(
    tmp_path_factory: pytest.TempPathFactory, quorum: int, ends: list[str], waited: float
) -> None:
    home = tmp_path_factory.mktemp("submodel_progress")
    jobs = [
        TrainJob("submodels", name, home, (), home / name, home / f"{name}-steps", STEPS, 16, Optimizer(), 5)
        for name in "abc"
    ]
    clock = Clock()
    submodel_progress = SubmodelProgress(jobs, Quorum(quorum), 1, home / "submodel_progress.json", clock)
    for name in ends:
        clock.now += 20
        submodel_progress.finish(name, RESULT, 1.0)
    clock.now += waited
    action = submodel_progress.verdict(SPEEDS).action
    assert (action == "go") == (len(ends) == 3 or (len(ends) >= quorum and waited >= 20 * (1.5 * quorum - len(ends))))


MIXED = LowMemoryPool.model_validate(
    {
        "types": [
            {"name": "small", "resource": "small_gpu", "memory_gb": 2, "price_per_hour": 0.1, "speed": 1},
            {"name": "large", "resource": "large_gpu", "memory_gb": 9, "price_per_hour": 1.0, "speed": 1},
        ]
    }
)


@pytest.fixture
def sized(jobs: list[TrainJob]) -> tuple[TrainJob, TrainJob, TrainJob]:
    """Of one model, and ever larger micro-batches."""
    jobs[0].model.mkdir()
    (jobs[0].model / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen3_moe",
                "hidden_size": 256,
                "num_hidden_layers": 8,
                "num_attention_heads": 4,
                "num_experts": 1,
                "moe_intermediate_size": 512,
                "num_experts_per_tok": 1,
                "vocab_size": 8000,
            }
        )
    )

    def job(job: TrainJob, micro_batch: int) -> TrainJob:
        return dataclasses.replace(
            job, sequence_length=1024, optimizer=Optimizer(batch_tokens=2**20, micro_batch=micro_batch)
        )

    return job(jobs[0], 1), job(jobs[1], 16), job(jobs[2], 512)


def test_a_training_goes_where_it_fits_for_the_least_money(sized: tuple[TrainJob, TrainJob, TrainJob]) -> None:
    placement = Placement(MIXED, 1, 0)
    one, sixteen, all_at_once = needs = [placement.need(job) for job in sized]
    assert one.memory_gb < 2 < sixteen.memory_gb < 9 < all_at_once.memory_gb
    placement.check(needs[:2])
    with pytest.raises(
        PoolError, match=r"^pools\.low_memory\.types: 9\.0: c needs \d+\.\d GiB, more than any node type has; add"
    ):
        placement.check(needs)
    assert place_all(needs[:2], placement.types({})) == {"a": "low_memory.small", "b": "low_memory.large"}
    # What needs little takes the larger one rather than wait; what needs much has no choice.
    assert place_all(needs[:2], placement.types({"low_memory.small": 0})) == {"a": "low_memory.large"}
    assert placement.on(MIXED.node_types[1]).bundle == {"large_gpu": 1}


def test_where_machines_are_all_alike_memory_is_the_plans_business(sized: tuple[TrainJob, TrainJob, TrainJob]) -> None:
    placement = Placement(LowMemoryPool(memory_gb=0.1), 1, 0)
    needs = [placement.need(job) for job in sized]
    placement.check(needs)
    assert set(place_all(needs, placement.types({"low_memory": 3})).values()) == {"low_memory"}
