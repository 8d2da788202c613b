"""A learning rate of the backbone's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_training import RECIPE, L, run, stop_after, variant, weights, write_shard, write_tiny

from moedisco_ray.models import ModelMap, Role, check_same
from moedisco_ray.training import BackboneRate, TrainJob, World
from moedisco_ray.training.optimizer import make_optimizer, set_rates
from moedisco_ray.training.sharding import trainable


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    torch.set_num_threads(1)
    write_shard(tmp_path / "shard")
    write_tiny(tmp_path / "moe", 2)
    return TrainJob(
        stage="submodels", name="submodel-0", model=tmp_path / "moe", shards=(tmp_path / "shard",), output=tmp_path / "out",
        checkpoints=tmp_path / "steps", steps=6, sequence_length=L, optimizer=RECIPE, checkpoint_every=100)


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_a_frozen_backbone_stays_as_it_is_and_the_experts_learn(job: TrainJob, state: str) -> None:
    recipe = RECIPE.model_copy(update={"state": state, "weight_decay": 0.1})
    frozen = variant(job, "frozen", optimizer=recipe, backbone_rate=BackboneRate(0.0))
    run(frozen)
    for key, before in weights(job.model).items():
        after = weights(frozen.output)[key]
        expected = before.to(after.dtype)
        assert torch.equal(after, expected) is (ModelMap("qwen3_moe").classify(key).role is Role.BACKBONE), key


def test_a_scale_of_one_changes_nothing(job: TrainJob) -> None:
    same = variant(job, "same", backbone_rate=BackboneRate(1.0))
    assert run(same).losses == run(job).losses
    check_same(weights(same.output), weights(job.output))


def test_it_applies_from_its_step_on_also_when_resumed(job: TrainJob) -> None:
    late = variant(job, "late", backbone_rate=BackboneRate(0.0, start=4))
    plain = run(job).losses
    run(late, stop=stop_after(3))
    assert run(late).losses[:5] == plain[:5]    # the first update that differs is the fifth; its loss is of before
    assert run(late).losses[5] != plain[5]


def test_every_group_has_its_rate(job: TrainJob) -> None:
    rate = BackboneRate(0.25, start=2)
    scaled = variant(job, "scaled", backbone_rate=rate)
    model = trainable(job.model, job.optimizer, World())
    optimizer = make_optimizer(model, scaled, World())
    by_rate: dict[tuple[int, bool], float] = {}
    for step in (1, 2):
        set_rates(optimizer, 1e-2, step, rate)
        by_rate |= {(step, group["backbone"]): group["lr"] for group in optimizer.param_groups}
    assert by_rate == {(1, False): 1e-2, (1, True): 1e-2, (2, False): 1e-2, (2, True): 2.5e-3}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
