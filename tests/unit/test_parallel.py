"""Replicas, shards and divided experts give the same training as one worker (gloo, CPU)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gang_processes import alone, gang
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import L, weights, write_shard, write_tiny
from training_worker import first_gradients

from moedisco_ray.core.config import Optimizer
from moedisco_ray.core.errors import TrainingError
from moedisco_ray.models import check_same, load_model
from moedisco_ray.models.expert_parallel import divided_experts
from moedisco_ray.models.speed import grouped_experts, sorted_experts
from moedisco_ray.policies.parallel import Layout, Sharing
from moedisco_ray.training import TrainJob, TrainResult, World
from moedisco_ray.training.expert_check import check_experts

pytestmark = pytest.mark.timeout(900)
STEPS = 4
LAYOUTS = {
    "data-2": Layout(data=2),
    "expert-2": Layout(expert=2),
    "expert-4": Layout(expert=4),
    "data-2-expert-2": Layout(data=2, expert=2),
    "replicate-2-data-2": Layout(replicate=2, data=2),
}

GRADIENT_ERROR = 1e-6
"""Largest difference between the gradients of a weight, or of one expert's weight, relative to their norm."""


@dataclasses.dataclass(frozen=True)
class Home:
    directory: Path
    base: TrainJob
    results: dict[str, TrainResult]

    def job(self, name: str, **changes: Any) -> TrainJob:
        return dataclasses.replace(
            self.base,
            name=name,
            output=self.directory / name / "out",
            checkpoints=self.directory / name / "steps",
            **changes,
        )

    def train(self, layout: str) -> dict[str, TrainResult]:
        """Results of the trainings of a layout, by recipe."""
        jobs = self.jobs(layout)
        if layout not in self.results:
            axes = LAYOUTS[layout]
            [first, *_] = gang(
                axes.replicate * axes.shards, self.directory, [(job, None) for job in jobs.values()], layout=axes
            )
            self.results.update({layout: first})
        return {recipe: self.results[layout][job.name] for recipe, job in jobs.items()}

    def jobs(self, layout: str) -> dict[str, TrainJob]:
        recipe = self.base.optimizer
        changes: dict[str, dict[str, Any]] = {
            "plain": {},
            "parts": {"micro_batch": 1, "gradient_checkpointing": True},
            "muon": {"name": "muon"},
        }
        jobs = {
            name: self.job(f"{layout}-{name}", optimizer=recipe.model_copy(update=change))
            for name, change in changes.items()
        }
        within = recipe.model_copy(update={"within_documents": True})
        jobs["documents"] = self.job(f"{layout}-documents", optimizer=within)
        return {**jobs, "uneven": self.job(f"{layout}-uneven", model=self.directory / "uneven")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    directory = tmp_path_factory.mktemp("parallel")
    torch.set_num_threads(1)
    write_shard(directory / "shard")
    write_tiny(directory / "moe", 4, family="qwen2_moe")
    write_tiny(directory / "uneven", 12, family="olmoe", tied=True)
    return Home(
        directory,
        TrainJob(
            stage="finetune",
            name="base",
            model=directory / "moe",
            packed_dirs=(directory / "shard",),
            output=directory / "out",
            checkpoints=directory / "steps",
            steps=STEPS,
            sequence_length=L,
            optimizer=Optimizer(lr=3e-3, batch_tokens=8 * L),
            checkpoint_every=100,
            seed=5,
            load_balance=0.05,
            z_loss=0.01,
            with_optimizer_state=True,
        ),
        {},
    )


@pytest.fixture(scope="module")
def single(home: Home) -> dict[str, TrainResult]:
    return {recipe: alone(job) for recipe, job in home.jobs("single").items()}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["plain", "parts", "muon", "documents", "uneven"])
@pytest.mark.parametrize("layout", [each for each in LAYOUTS if each != "expert-4"])
def test_every_layout_trains_as_one_worker(
    home: Home, single: dict[str, TrainResult], layout: str, recipe: str
) -> None:
    found = home.train(layout)[recipe]
    assert found.losses == pytest.approx(single[recipe].losses, rel=1e-5)
    ours, theirs = (weights(home.jobs(each)[recipe].output) for each in (layout, "single"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-5)


def test_every_layout_has_the_gradients_of_one_worker(home: Home) -> None:
    axes, jobs = LAYOUTS["expert-4"], home.jobs("expert-4-gradients")
    del jobs["muon"]  # the optimizer has no part in them
    ranks = gang(
        axes.replicate * axes.shards,
        home.directory,
        [(job, None) for job in jobs.values()],
        layout=axes,
        gradients=True,
    )
    for recipe, job in jobs.items():
        expected = first_gradients(job, World())
        assert all(rank[job.name].keys() == expected.keys() for rank in ranks)
        for name, (whole, _) in expected.items():
            found = torch.full_like(whole, torch.nan)
            for rank in ranks:
                part, offset = rank[job.name][name]
                found[tuple(slice(first, first + size) for first, size in zip(offset, part.shape, strict=True))] = part
            rows = zip(found, whole, strict=True) if ".experts." in name else [(found, whole)]
            errors = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in rows]
            assert max(errors) < GRADIENT_ERROR, (recipe, name, errors)


@pytest.mark.slow
def test_a_checkpoint_of_divided_experts_resumes_in_another_layout(home: Home, single: dict[str, TrainResult]) -> None:
    home.train("expert-2")
    job = dataclasses.replace(home.job("expert-2-plain"), output=home.directory / "resumed" / "out")
    key = home.directory / "expert-2-plain" / "checkpoints.key"
    job.output.parent.mkdir()
    (job.output.parent / key.name).write_bytes(key.read_bytes())
    assert alone(job).restored_step == STEPS
    check_same(weights(job.output), weights(home.directory / "expert-2-plain" / "out"))


@pytest.mark.parametrize("compute", [sorted_experts, grouped_experts])
def test_divided_experts_of_a_group_of_one_are_all_experts(home: Home, tmp_path: Path, compute: Any) -> None:
    model = load_model(home.directory / "moe")
    experts = model.model.layers[0].mlp.experts
    x_TD, weight_TK = torch.randn(10, 32, requires_grad=True), torch.rand(10, 2)
    expert_TK = torch.rand(10, 4).topk(2).indices
    expected = compute(experts, x_TD, expert_TK, weight_TK)
    [expected_grad] = torch.autograd.grad(expected.square().sum(), x_TD)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        found = divided_experts(experts, x_TD, expert_TK, weight_TK, group=dist.group.WORLD, compute=compute)
        [found_grad] = torch.autograd.grad(found.square().sum(), x_TD)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_grad, expected_grad)


def test_an_expert_with_tokens_and_no_gradient_is_an_error(home: Home) -> None:
    model = load_model(home.directory / "moe")
    tokens = torch.arange(1, 17)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    selected_NE = torch.ones(2, 4)
    model.model.layers[1].mlp.experts.gate_up_proj.grad[2] = 0
    check_experts(model, selected_NE, World())
    model.model.layers[1].mlp.experts.down_proj.grad[2] = 0
    with pytest.raises(TrainingError, match="expert 2 of layer 1 got tokens but no gradient"):
        check_experts(model, selected_NE, World())
    selected_NE[1, 2] = 0
    check_experts(model, selected_NE, World())


@given(
    st.integers(1, 32),
    st.integers(1, 8),
    st.integers(1, 128),
    st.integers(1, 32),
    st.integers(1, 16) | st.none(),
    st.booleans(),
)
def test_a_layout_uses_every_worker_and_divides_the_experts_evenly(
    workers: int, per_node: int, experts: int, fewest: int, expert: int | None, whole: bool
) -> None:
    found = Sharing(experts, expert, fewest_shards=fewest, whole_experts=whole).layout(workers, per_node)
    assert found.replicate * found.shards == workers
    assert experts % found.expert == 0
    assert found.expert <= (expert or per_node)
    assert not whole or found.expert == 1 or experts % found.shards == 0


def test_the_default_keeps_tokens_inside_a_node_and_replicates_over_nodes() -> None:
    assert Sharing(128).layout(8, 8) == Layout(expert=8)
    assert Sharing(128).layout(16, 8) == Layout(replicate=2, expert=8)
    assert Sharing(128, fewest_shards=16).layout(16, 8) == Layout(data=2, expert=8)
    assert Sharing(60).layout(8, 8) == Layout(data=2, expert=4)
    assert Sharing(60, whole_experts=True).layout(8, 8) == Layout(data=8)
    assert Sharing(128).layout(8, 1) == Layout(data=8)
