"""How torch computes in a training, with deterministic kernels and TF32 or without, and as before at its end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_training import RECIPE, L, ignore, never, variant, weights, write_shard, write_tiny

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models import check_same
from moedisco_ray.training import TrainJob, World, arithmetic_of, train


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return TrainJob(
        stage="submodels",
        name="submodel-0",
        model=tmp_path / "moe",
        packed_dirs=(tmp_path / "shard",),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=3,
        sequence_length=L,
        optimizer=RECIPE,
        checkpoint_every=None,
        seed=5,
    )


def fixed_order() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def test_a_deterministic_training_takes_deterministic_kernels_in_each_step_and_has_the_bits_of_others_on_a_cpu(
    job: TrainJob, tmp_path: Path
) -> None:
    write_shard(tmp_path / "shard")
    write_tiny(tmp_path / "moe", 4)
    plain, found = variant(job, "plain"), list[bool]()
    train(plain, World(), ignore, never)
    train(dataclasses.replace(job, deterministic=True), World(), ignore, never, lambda _: found.append(fixed_order()))
    assert found == [True] * len(found) != []
    assert not fixed_order()
    check_same(weights(job.output), weights(plain.output))


def put_twice() -> None:
    torch.zeros(3).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))


def test_an_operation_without_a_deterministic_form_ends_a_deterministic_training_in_one_line(job: TrainJob) -> None:
    with arithmetic_of(job, World()):
        put_twice()
    line = r"deterministic: True: torch computes put_ on cpu in no fixed order; set it to false"
    with (
        pytest.raises(ConfigError, match=f"^{line}$"),
        arithmetic_of(dataclasses.replace(job, deterministic=True), World()),
    ):
        put_twice()
    assert not fixed_order()


def test_other_errors_stay_what_they_are(job: TrainJob) -> None:
    with (
        pytest.raises(RuntimeError, match="shape"),
        arithmetic_of(dataclasses.replace(job, deterministic=True), World()),
    ):
        torch.zeros(2) @ torch.zeros(3).view(1, 3)


@pytest.mark.parametrize(
    ("precision", "device", "products"),
    [
        ("bf16", "cuda:0", "high"),
        ("pure_bf16", "cuda:0", "high"),
        ("fp32", "cuda:0", "highest"),
        ("bf16", "cpu", "highest"),
    ],
)
def test_products_in_fp32_use_tf32_on_a_gpu_unless_the_training_is_in_fp32(
    job: TrainJob, precision: str, device: str, products: str
) -> None:
    recipe = RECIPE.model_copy(update={"precision": precision})
    with arithmetic_of(dataclasses.replace(job, optimizer=recipe), World(device=device)):
        assert torch.get_float32_matmul_precision() == products
    assert torch.get_float32_matmul_precision() == "highest"
