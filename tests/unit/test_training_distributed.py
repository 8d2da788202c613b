"""The same training on one, two and three workers (gloo, CPU)."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gang_processes import alone, gang
from tiny_training import L, weights, write_shard, write_tiny
from training_worker import STOP, Counting

from moedisco_ray.core.config import Optimizer
from moedisco_ray.core.records.events import Event
from moedisco_ray.models import check_same, load_model
from moedisco_ray.models.optimizer_state import KINDS, OPTIMIZER_FOLDER, open_optimizer_state
from moedisco_ray.training import TrainJob, TrainResult, World, train
from moedisco_ray.training.checkpoints import checkpoint

# the gangs are several processes, and run once for all of these
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

BATCH, STEPS = 4, 10
NOBODY = None


@dataclasses.dataclass(frozen=True)
class Runs:
    home: Path
    base: TrainJob
    two: list[dict[str, Any]]
    three: list[dict[str, Any]]

    @property
    def after(self) -> dict[str, Any]:
        """Settings with which a job continues from the training `before`."""
        before = self.home / "before-out"
        return {"model": before, "optimizer_state": before / OPTIMIZER_FOLDER, "with_optimizer_state": True}

    def job(self, name: str, **changes: Any) -> TrainJob:
        return dataclasses.replace(
            self.base, name=name, output=self.home / f"{name}-out", checkpoints=self.home / f"{name}-steps", **changes
        )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    home = tmp_path_factory.mktemp("gang")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    write_tiny(home / "moe", 4, family="qwen2_moe")
    write_tiny(home / "tied", 4, family="olmoe", tied=True)
    write_tiny(home / "dense", 1, family="qwen3_moe")
    write_tiny(home / "recurrent", 4, family="qwen3_next")
    recipe = Optimizer(lr=3e-3, batch_tokens=BATCH * L, schedule="cosine", warmup=0.1)
    base = TrainJob(
        stage="finetune",
        name="base",
        model=home / "moe",
        packed_dirs=(home / "shard",),
        output=home / "out",
        checkpoints=home / "steps",
        steps=STEPS,
        sequence_length=L,
        optimizer=recipe,
        checkpoint_every=100,
        seed=5,
        load_balance=0.05,
        z_loss=0.01,
        log_every=5,
    )
    runs = Runs(home, base, [], [])
    alone(runs.job("before", with_optimizer_state=True))
    small = recipe.model_copy(update={"precision": "pure_bf16"})
    fp8 = small.model_copy(update={"moments": "fp8"})
    muon = recipe.model_copy(update={"name": "muon"})
    runs.two.extend(
        gang(
            2,
            home,
            [
                (runs.job("two"), NOBODY),
                (
                    runs.job(
                        "parts", optimizer=recipe.model_copy(update={"micro_batch": 1, "gradient_checkpointing": True})
                    ),
                    NOBODY,
                ),
                (
                    runs.job("each", optimizer=recipe.model_copy(update={"micro_batch": 1}), exchange="micro_batch"),
                    NOBODY,
                ),
                (runs.job("looked", held_out=Counting()), NOBODY),
                (runs.job("tied", model=home / "tied"), NOBODY),
                (runs.job("dense", model=home / "dense"), NOBODY),
                (runs.job("recurrent", model=home / "recurrent"), NOBODY),
                (runs.job("bf16", optimizer=recipe.model_copy(update={"precision": "bf16"})), NOBODY),
                (runs.job("small", optimizer=small), NOBODY),
                (runs.job("small-again", optimizer=small), 0),
                (runs.job("small-again", optimizer=small), NOBODY),
                (runs.job("fp8", optimizer=fp8, with_optimizer_state=True), NOBODY),
                (runs.job("fp8-again", optimizer=fp8, with_optimizer_state=True), 0),
                (runs.job("fp8-again", optimizer=fp8, with_optimizer_state=True), NOBODY),
                (runs.job("again"), 1),
                (runs.job("again"), NOBODY),
                (runs.job("muon", optimizer=muon), NOBODY),
                (runs.job("after", **runs.after), NOBODY),
                (runs.job("wild", optimizer=Optimizer(lr=1e30, batch_tokens=BATCH * L)), NOBODY),
            ],
        )
    )
    for name in ("to-one", "to-three"):
        shutil.copytree(home / "again-steps" / f"step-{STOP:07d}", home / f"{name}-steps" / f"step-{STOP:07d}")
    runs.three.extend(gang(3, home, [(runs.job("three"), NOBODY), (runs.job("to-three"), NOBODY)]))
    return runs


def close(runs: Runs, name: str, reference: TrainJob, losses: Sequence[float], expected: Sequence[float]) -> None:
    assert losses == pytest.approx(expected, rel=2e-5)
    torch.testing.assert_close(weights(runs.home / f"{name}-out"), weights(reference.output), rtol=1e-3, atol=5e-5)


@pytest.fixture(scope="module")
def one(runs: Runs) -> tuple[TrainJob, TrainResult]:
    job = runs.job("one")
    return job, alone(job)


@pytest.mark.parametrize("name", ["two", "parts", "each"])
def test_two_workers_equal_one(runs: Runs, one: tuple[TrainJob, TrainResult], name: str) -> None:
    close(runs, name, one[0], runs.two[0][name].losses, one[1].losses)


def test_a_batch_that_three_workers_cannot_share_evenly_gives_the_same(
    runs: Runs, one: tuple[TrainJob, TrainResult]
) -> None:
    assert BATCH % 3
    close(runs, "three", one[0], runs.three[0]["three"].losses, one[1].losses)


def test_muon_sees_whole_matrices_on_every_worker(runs: Runs) -> None:
    job = runs.job("muon-alone", optimizer=runs.base.optimizer.model_copy(update={"name": "muon"}))
    close(runs, "muon", job, runs.two[0]["muon"].losses, alone(job).losses)


@pytest.mark.parametrize("name", ["tied", "dense", "recurrent"])
def test_tied_embeddings_one_expert_layers_and_recurrent_layers_shard_too(runs: Runs, name: str) -> None:
    job = runs.job(f"{name}-alone", model=runs.home / name)
    close(runs, name, job, runs.two[0][name].losses, alone(job).losses)


def test_looks_at_the_held_out_loss_see_the_whole_model_and_change_no_bit(runs: Runs) -> None:
    check_same(weights(runs.home / "looked-out"), weights(runs.home / "two-out"))
    assert runs.two[1]["looked-looks"] == []  # rank 0 tells
    looks = runs.two[0]["looked-looks"]
    assert [(look["step"], look["tokens"]) for look in looks] == [
        (4, 4 * BATCH * L),
        (8, 8 * BATCH * L),
        (10, 10 * BATCH * L),
    ]
    events: list[Event] = []
    train(runs.job("looked-alone", held_out=Counting()), World(), events.append, lambda: False)
    alone_looks = [event.data["held_out_loss"] for event in events if event.type == "evaluation"]
    assert [look["held_out_loss"] for look in looks] == pytest.approx(alone_looks, rel=2e-5)
    model = load_model(runs.home / "looked-alone-out").eval()
    ((inputs_BL, targets_BL),) = Counting().batches(1)
    with torch.no_grad():
        directly = model(input_ids=inputs_BL).logits.log_softmax(-1)
    real = targets_BL != -100
    assert alone_looks[-1] == pytest.approx(
        -directly[real].gather(1, targets_BL[real][:, None]).mean().item(), rel=1e-5
    )


def test_all_ranks_return_the_same(runs: Runs) -> None:
    for ranks in (runs.two, runs.three):
        for name, first in ranks[0].items():
            for other in ranks[1:]:
                if isinstance(first, TrainResult):
                    assert dataclasses.replace(other[name], seconds=0) == dataclasses.replace(first, seconds=0)
                elif not name.endswith("-looks"):  # rank 0 alone tells of them
                    assert other[name] == first


def test_one_worker_that_wants_to_stop_stops_all_and_the_same_gang_resumes_bit_for_bit(runs: Runs) -> None:
    again = runs.two[0]["again"]
    assert (again.finished, again.restored_step) == (True, STOP)
    assert again.losses == runs.two[0]["two"].losses
    check_same(weights(runs.home / "again-out"), weights(runs.home / "two-out"))


def test_two_workers_checkpoint_resumes_on_one(runs: Runs, one: tuple[TrainJob, TrainResult]) -> None:
    result = alone(runs.job("to-one"))
    assert result.restored_step == STOP
    close(runs, "to-one", one[0], result.losses, one[1].losses)


def test_two_workers_checkpoint_resumes_on_three(runs: Runs, one: tuple[TrainJob, TrainResult]) -> None:
    result = runs.three[0]["to-three"]
    assert result.restored_step == STOP
    close(runs, "to-three", one[0], result.losses, one[1].losses)


def test_bf16_arithmetic_on_shards_stays_near_fp32(runs: Runs, one: tuple[TrainJob, TrainResult]) -> None:
    for name in ("bf16", "small", "fp8"):
        losses = runs.two[0][name].losses
        assert losses != one[1].losses
        assert losses == pytest.approx(one[1].losses, rel=0.03)


@pytest.mark.parametrize("name", ["small", "fp8"])
def test_bf16_and_8_bit_state_on_shards_resumes_bit_for_bit(runs: Runs, name: str) -> None:
    again = runs.two[0][f"{name}-again"]
    assert again.restored_step == STOP
    assert again.losses == runs.two[0][name].losses
    check_same(weights(runs.home / f"{name}-again-out"), weights(runs.home / f"{name}-out"))
    for kind in KINDS if name == "fp8" else ():
        folders = [runs.home / f"{each}-out" / OPTIMIZER_FOLDER / kind for each in (name, f"{name}-again")]
        check_same(weights(folders[0]), weights(folders[1]))


def test_every_rank_raises_when_a_step_overflows(runs: Runs) -> None:
    assert all(re.match(r"wild: the (loss|norm of the gradient) of step \d is (inf|nan)", r["wild"]) for r in runs.two)
    assert checkpoint.latest(runs.job("wild").checkpoints) is None


def test_two_workers_take_moments_up_and_lay_them_down_as_one_does(runs: Runs) -> None:
    reference = runs.job("after-alone", **runs.after)
    close(runs, "after", reference, runs.two[0]["after"].losses, alone(reference).losses)
    ours, theirs = (
        open_optimizer_state(runs.home / name / OPTIMIZER_FOLDER) for name in ("after-out", "after-alone-out")
    )
    assert ours is not None
    assert theirs is not None
    assert ours.steps == theirs.steps == 2 * STEPS
    for kind in KINDS:
        torch.testing.assert_close(dict(ours.tensors[kind]), dict(theirs.tensors[kind]), rtol=1e-2, atol=1e-6)
