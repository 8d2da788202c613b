"""Trainings do what the configuration says of levers: a run compared with trainings written out by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_runs import one_thread
from small_run import OneCorpus, small_config

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import Optimizer, Outer, RunConfig
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import open_checkpoint
from moedisco_ray.policies.parallel import Sharing
from moedisco_ray.policies.sync_points import sync_steps
from moedisco_ray.stages.context import Context
from moedisco_ray.stages.train.jobs import make_job, seed_sync_plans, sync_plans
from moedisco_ray.training import SyncPlan, TrainJob, TrainResult, World, train

CHANGES: dict[str, Any] = {
    "tokens": {"total": 24_000, "seed_share": 0.0, "finetune_share": 0.4},
    "model": {
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
    },
    "submodels": {
        "optimizer": {"batch_tokens": 256, "lr": 2e-3},
        "sync_every": 8,
        "outer": {"lr": 0.9, "momentum": 0.5},
        "quorum": 2,
    },
    "finetune": {
        "optimizer": {"batch_tokens": 128, "lr": 1e-3, "schedule": "run_cosine", "warmup": 0.05},
        "load_balance": 0.05,
        "z_loss": 0.004,
    },
}
STEPS = 75  # 9,600 tokens of the fine-tune in batches of 128


class Noting(OneCorpus):
    """Keeps the trainings that it was given, and how they ended."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[TrainJob, Trained]] = {}

    def train_all(self, jobs: Any, *args: Any, **kwargs: Any) -> list[Trained]:
        trained = super().train_all(jobs, *args, **kwargs)
        self.seen |= {job.name: (job, each) for job, each in zip(jobs, trained, strict=True)}
        return trained


@dataclasses.dataclass(frozen=True)
class Finished:
    config: RunConfig
    seen: dict[str, tuple[TrainJob, Trained]]

    @property
    def directory(self) -> Path:
        return self.config.directory

    def job(self, name: str) -> TrainJob:
        return self.seen[name][0]

    def result(self, name: str) -> TrainResult:
        return self.seen[name][1].result

    @property
    def submodels(self) -> list[TrainJob]:
        return [self.job(f"submodel-{k}") for k in range(2)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    backend = Noting()
    config = small_config(tmp_path_factory.mktemp("levers"), **CHANGES)
    with one_thread():
        pipeline.run(config, backend=backend)
        yield Finished(config, backend.seen)


def context(tmp_path: Path, **changes: Any) -> Context:
    config = small_config(tmp_path, **changes)
    return Context(config, config.directory, "0" * 64, lambda _: None, LocalBackend())


def by_hand(run: Finished) -> TrainJob:
    given = run.job("finetune")
    return TrainJob(
        stage="finetune",
        name="finetune",
        model=run.directory / "merged",
        packed_dirs=(run.directory / "corpus" / "shards",),
        output=given.output,
        checkpoints=given.checkpoints,
        steps=STEPS,
        sequence_length=64,
        optimizer=Optimizer(lr=1e-3, schedule="run_cosine", warmup=0.05, batch_tokens=128),
        checkpoint_every=10,
        keep=2,
        seed=3,
        span=(0.6, 1.0),
        load_balance=0.05,
        z_loss=0.004,
        log_every=1,
        logs=run.directory / "logs",
        optimizer_state=run.directory / "merged" / "optimizer_state",
        sharing=Sharing(experts=4),
    )


# --- the fine-tune


def test_the_fine_tune_is_the_one_that_is_written_by_hand(run: Finished) -> None:
    assert run.job("finetune") == by_hand(run)


def again(job: TrainJob, home: Path) -> TrainResult:
    return train(
        dataclasses.replace(job, output=home / "out", checkpoints=home / "steps"),
        World(),
        lambda _: None,
        lambda: False,
    )


def test_its_losses_are_those_of_the_one_by_hand(run: Finished, tmp_path: Path) -> None:
    result = again(by_hand(run), tmp_path)
    assert result.losses == run.result("finetune").losses
    assert (result.finished, result.steps) == (True, STEPS)


@pytest.mark.parametrize(
    ("lever", "off"),
    [
        ("load_balance", 0.0),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("z_loss", 0.0), ("span", (0.0, 1.0)))),
    ],
)
def test_without_one_of_its_levers_it_comes_to_other_losses(
    run: Finished, tmp_path: Path, lever: str, off: Any
) -> None:
    without = again(dataclasses.replace(by_hand(run), **{lever: off}), tmp_path)
    assert without.losses != run.result("finetune").losses


# --- the sub-models


def by_hand_apart(run: Finished, number: int, at: tuple[int, ...]) -> TrainJob:
    given = run.submodels[number]
    return TrainJob(
        stage="submodels",
        name=f"submodel-{number}",
        model=run.directory / "decomposed" / str(number),
        packed_dirs=(run.directory / "clusters" / "shards" / str(number),),
        output=given.output,
        checkpoints=given.checkpoints,
        steps=given.steps,
        sequence_length=64,
        optimizer=Optimizer(lr=2e-3, batch_tokens=256),
        checkpoint_every=10,
        keep=2,
        seed=1 + number,
        log_every=1,
        logs=run.directory / "logs",
        with_optimizer_state=True,
        drop_checkpoints=True,
        span=(0.0, 0.6),
        load_balance=0.05,
        z_loss=0.004,
        sync=SyncPlan(given.sync.directory, at, Outer(lr=0.9, momentum=0.5), 600.0, ranges=2),
    )


def test_sub_models_are_the_ones_that_are_written_by_hand(run: Finished) -> None:
    at = sync_steps([job.steps for job in run.submodels], 8)
    assert min(map(len, at)) >= 2  # else no momentum goes on
    assert run.submodels == [by_hand_apart(run, number, at[number]) for number in range(2)]
    assert {job.sync.directory for job in run.submodels} == {run.submodels[0].sync.directory}


def is_same_again(run: Finished, home: Path, sync: dict[str, Any], **changes: Any) -> bool:
    """Whether the sub-models, trained by hand, come to the weights that the run's came to."""
    jobs = [
        dataclasses.replace(
            job,
            output=home / job.name,
            checkpoints=home / f"{job.name}-steps",
            sync=dataclasses.replace(job.sync, directory=home / "sync", **sync),
            **changes,
        )
        for number in range(2)
        for job in [by_hand_apart(run, number, run.submodels[number].sync.steps)]
    ]
    jobs.sort(key=lambda job: -job.steps)  # a sync adds its members up in the order in which they start
    LocalBackend().train_all(jobs, Placement(run.config.pools.low_memory, 1, 0), home / "ray", lambda _: None)
    pairs = [(open_checkpoint(job.output), open_checkpoint(run.directory / "submodels" / job.name[-1])) for job in jobs]
    return all(torch.equal(mine[key], theirs[key]) for mine, theirs in pairs for key in theirs)


def test_their_weights_are_those_of_the_ones_by_hand_and_need_every_lever(run: Finished, tmp_path: Path) -> None:
    assert is_same_again(run, tmp_path / "same", {})
    assert not is_same_again(run, tmp_path / "default", {"outer": Outer()})


def test_router_losses_are_of_all_that_have_routers_to_learn(tmp_path: Path) -> None:
    weights = {"load_balance": 0.05, "z_loss": 0.004}
    sizes = CHANGES["model"]["config"]

    def losses(name: str, experts: int, stage: str) -> tuple[float, float]:
        there = context(tmp_path / name, finetune=weights, model={"config": {**sizes, "num_experts": experts}})
        job = make_job(there, stage, stage, model=Path("model"), shards=Path("shards"), steps=10, seed=0)
        return job.load_balance, job.z_loss

    # Two clusters: of four experts a sub-model has two, of two one.
    assert (
        losses("several", 4, "submodels")
        == losses("several", 4, "seed")
        == losses("one", 2, "finetune")
        == (0.05, 0.004)
    )
    assert losses("one", 2, "submodels") == losses("one", 2, "seed") == (0.0, 0.0)


def test_syncs_are_those_of_the_configuration_where_there_are_any(tmp_path: Path) -> None:
    settings = small_config(
        tmp_path, submodels={"sync_every": 5, "outer": {"lr": 0.25, "momentum": 0.75}, "quorum": 2}
    ).submodels
    # The shorter syncs at the same shares of its steps. The merge replaces a sync at the last step.
    assert sync_plans([20, 12], settings, tmp_path) == [
        SyncPlan(tmp_path, (5, 10, 15), Outer(lr=0.25, momentum=0.75), 600.0, ranges=2),
        SyncPlan(tmp_path, (3, 6, 9), Outer(lr=0.25, momentum=0.75), 600.0, ranges=2),
    ]
    coded = settings.model_copy(update={"sync_bits": 4})
    assert {plan and plan.bits for plan in sync_plans([20, 12], coded, tmp_path)} == {4}
    assert {plan and plan.bits for plan in seed_sync_plans([20, 20], coded, tmp_path)} == {4}
    assert sync_plans([20], settings, tmp_path) == [None]
    assert sync_plans([5, 4], settings, tmp_path) == [None, None]
    assert sync_plans([20, 12], small_config(tmp_path).submodels, tmp_path) == [None, None]
