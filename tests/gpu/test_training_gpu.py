"""Trainings on one GPU against the same trainings on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import RECIPE, L, ignore, never, stop_after, variant, weights, write_shard, write_tiny
from torch import Tensor

from moedisco_ray.models import check_same
from moedisco_ray.training import TrainJob, World, devices_of, train
from moedisco_ray.training.batches import Batches
from moedisco_ray.training.sharding import autocast, trainable

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
STEPS, STOP = 8, 4
BF16_ERROR = 0.03
"""Largest relative difference between results in bf16 and in fp32."""
RECIPES: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({"precision": "fp32"}, 1e-4),
    "bf16": ({"precision": "bf16"}, BF16_ERROR),
    "pure_bf16": ({"precision": "pure_bf16"}, BF16_ERROR),
    "recomputed": ({"precision": "fp32", "gradient_checkpointing": True, "micro_batch": 4}, 1e-4),
    "documents": ({"precision": "fp32", "within_documents": True}, 1e-4),
    "documents-bf16": ({"precision": "bf16", "within_documents": True}, BF16_ERROR),
    "documents-pure_bf16": ({"precision": "pure_bf16", "within_documents": True}, BF16_ERROR),
    "fp8": ({"precision": "pure_bf16", "moments": "fp8"}, BF16_ERROR),
    "offloaded": ({"precision": "fp32", "offload_moments": True}, 1e-4),
    "blocks": ({"precision": "fp32", "block_steps": 2}, 1e-4),
    "muon": ({"precision": "fp32", "name": "muon"}, BF16_ERROR),  # which multiplies in bf16 on a GPU
}
"""Settings of the optimizer, and the largest relative difference of losses between GPU and CPU."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("gpu")
    write_shard(home / "shard")
    write_tiny(home / "moe", 4)
    write_tiny(home / "dense", 1)
    return home


@pytest.fixture
def job(home: Path, tmp_path: Path) -> TrainJob:
    return TrainJob(
        stage="finetune",
        name="gpu",
        model=home / "moe",
        packed_dirs=(home / "shard",),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=STEPS,
        sequence_length=L,
        optimizer=RECIPE,
        checkpoint_every=STOP,
        seed=5,
        load_balance=0.02,
        z_loss=0.01,
        log_every=2,
    )


def on(job: TrainJob, device: str, model: str, **recipe: Any) -> TrainJob:
    """A variant of a job, with paths of its own."""
    optimizer = job.optimizer.model_copy(update=recipe)
    return dataclasses.replace(variant(job, device, optimizer=optimizer), model=job.model.with_name(model))


def gradients(job: TrainJob, device: str) -> dict[str, Tensor]:
    """Gradients of the loss of the first batch."""
    world = World(device=device)
    model = trainable(job.model, job.optimizer, world)
    [batch] = Batches(job, world)(0)
    with autocast(job.optimizer, world):
        loss = model(batch.inputs_BL, batch.targets_BL, batch.positions_BL)
    torch.autograd.backward(loss)
    return {name: each.grad.detach().float().cpu() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize(("precision", "largest"), [("fp32", 1e-4), ("bf16", BF16_ERROR), ("pure_bf16", BF16_ERROR)])
def test_gradients_of_a_submodel_are_those_of_the_cpu(
    job: TrainJob, device: str, precision: str, largest: float
) -> None:
    found = gradients(on(job, device, "dense", precision=precision), device)
    expected = gradients(on(job, "cpu", "dense", precision="fp32"), "cpu")
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - each).norm() / each.norm()) for name, each in expected.items()}
    assert {name: error for name, error in errors.items() if not error < largest} == {}


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        ({"precision": "fp32"}, 1e-4),
        ({"precision": "pure_bf16", "micro_batch": 2}, BF16_ERROR),
        ({"precision": "bf16", "name": "muon", "micro_batch": 2}, BF16_ERROR),
        ({"precision": "pure_bf16", "name": "muon", "within_documents": True}, BF16_ERROR),
    ],
)
def test_streamed_losses_are_those_of_resident_training(
    job: TrainJob, device: str, settings: dict[str, Any], largest: float
) -> None:
    resident = on(job, device, "moe", **settings)
    streamed = variant(resident, "streamed", memory="streamed")
    found, expected = (train(each, World(device=device), ignore, never).losses for each in (streamed, resident))
    assert found == pytest.approx(expected, rel=largest)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("settings", [{"precision": "fp32"}, {"precision": "fp32", "name": "muon", "micro_batch": 2}])
def test_two_cards_stream_with_the_losses_of_one(job: TrainJob, device: str, settings: dict[str, Any]) -> None:
    one = dataclasses.replace(on(job, device, "moe", **settings), memory="streamed")
    two = World(device=device, devices=devices_of(device, 2))
    expected = train(one, World(device=device), ignore, never).losses
    assert train(variant(one, "two"), two, ignore, never).losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_are_those_of_the_cpu(job: TrainJob, device: str, model: str, recipe: str) -> None:
    settings, largest = RECIPES[recipe]
    found = train(on(job, device, model, **settings), World(device=device), ignore, never)
    reference = {**settings, "precision": "fp32"} if "bf16" in settings["precision"] else settings
    expected = train(on(job, "cpu", model, **reference), World(), ignore, never)
    assert found.losses == pytest.approx(expected.losses, rel=largest)
    assert found.losses[-1] < found.losses[0]


@pytest.mark.filterwarnings("ignore")  # torch's compiler uses deprecated functions
@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_compiled_layers_have_the_losses_of_the_cpu(job: TrainJob, device: str, model: str, precision: str) -> None:
    found = train(on(job, device, model, precision=precision, compile=True), World(device=device), ignore, never)
    expected = train(on(job, "cpu", model, precision="fp32"), World(), ignore, never)
    assert found.losses == pytest.approx(expected.losses, rel=BF16_ERROR)


@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize("recipe", ["bf16", "pure_bf16", "fp8", "offloaded", "documents-bf16", "muon"])
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    job: TrainJob, device: str, model: str, recipe: str
) -> None:
    whole = dataclasses.replace(on(job, device, model, **RECIPES[recipe][0]), deterministic=True)
    parts = variant(whole, "parts")
    uninterrupted = train(whole, World(device=device), ignore, never)
    stopped = train(parts, World(device=device), ignore, stop_after(STOP))
    assert (stopped.finished, stopped.steps) == (False, STOP)
    resumed = train(parts, World(device=device), ignore, never)
    assert resumed.restored_step == STOP
    assert resumed.losses == uninterrupted.losses
    check_same(weights(parts.output), weights(whole.output))


def test_a_checkpoint_of_a_gpu_resumes_on_the_cpu(job: TrainJob, device: str) -> None:
    here = on(job, device, "moe", precision="fp32")
    train(here, World(device=device), ignore, stop_after(STOP))
    resumed = train(here, World(), ignore, never)
    assert resumed.restored_step == STOP
    assert resumed.losses == pytest.approx(
        train(on(job, "cpu", "moe", precision="fp32"), World(), ignore, never).losses, rel=1e-4
    )
