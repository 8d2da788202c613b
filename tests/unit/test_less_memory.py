"""Training with less memory: moments in 8 bits, moments in the machine's memory, and one block of weights at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_training import BATCH, RECIPE, L, run, stop_after, variant, weights, write_shard, write_tiny

from moedisco_ray.core.config import Optimizer
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.limits import MOMENT_BLOCK
from moedisco_ray.models import check_same, open_checkpoint
from moedisco_ray.models.optimizer_state import KINDS, OPTIMIZER_FOLDER
from moedisco_ray.training import TrainJob, World, optimizer_state, write_partial_result
from moedisco_ray.training import optimizer as optimizer_module
from moedisco_ray.training.blocks import Blocks
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.moments import add_moments, decoded, encode
from moedisco_ray.training.optimizer import RoundingAdamW
from moedisco_ray.training.sharding import trainable
from moedisco_ray.training.stepper import ResidentStepper

STEPS = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("less-memory")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    write_tiny(home / "moe", 4)
    write_tiny(home / "dense", 1)
    write_tiny(home / "tied", 2, tied=True)
    return home


@pytest.fixture
def job(home: Path, tmp_path: Path) -> TrainJob:
    return TrainJob(
        stage="finetune",
        name="finetune",
        model=home / "moe",
        packed_dirs=(home / "shard",),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=STEPS,
        sequence_length=L,
        optimizer=RECIPE,
        checkpoint_every=3,
        keep=2,
        seed=5,
        load_balance=0.02,
        z_loss=0.01,
        log_every=2,
    )


def with_recipe(job: TrainJob, name: str, **changes: Any) -> TrainJob:
    return variant(job, name, optimizer=job.optimizer.model_copy(update=changes))


# --- 8 bits


def stored(value: torch.Tensor, *, is_root: bool, seed: int = 0) -> torch.Tensor:
    moment = torch.zeros(len(value), dtype=torch.float8_e4m3fn)
    scales = torch.zeros(len(value) // MOMENT_BLOCK, dtype=torch.bfloat16)
    encode(value.clone(), moment, scales, torch.Generator().manual_seed(seed), is_root=is_root)
    return decoded(moment, scales)


@given(st.integers(0, 2**31), st.integers(-30, 10), st.booleans())
def test_numbers_in_8_bits_are_near_and_survive_being_handed_over(seed: int, exponent: int, is_root: bool) -> None:
    value = torch.randn(4 * MOMENT_BLOCK, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    value = value.abs() if is_root else value
    found = stored(value, is_root=is_root, seed=seed)
    largest = value.abs().view(-1, MOMENT_BLOCK).amax(dim=1).repeat_interleave(MOMENT_BLOCK)
    large = value.abs() > largest * 2.0**-13
    assert ((found - value).abs()[large] <= value.abs()[large] / 8).all()
    assert ((found - value).abs()[~large] <= largest[~large] * 2.0**-15).all()
    handed_over = found.square().bfloat16().float().sqrt() if is_root else found.bfloat16().float()
    assert torch.equal(handed_over, found)
    assert torch.equal(stored(handed_over, is_root=is_root, seed=seed + 1), found)


def test_numbers_in_8_bits_are_right_in_the_mean() -> None:
    value = torch.full((MOMENT_BLOCK,), 0.3)
    found = torch.stack([stored(value, is_root=False, seed=seed) for seed in range(400)])
    assert set(found.unique().tolist()) == {0.28125, 0.3125}
    assert found.mean().item() == pytest.approx(0.3, rel=1e-3)


def test_no_root_of_a_second_moment_becomes_zero() -> None:
    value = torch.full((MOMENT_BLOCK,), 1e-30)
    value[0] = 1.0
    assert stored(value, is_root=True).min() >= 2.0**-18


@pytest.mark.parametrize(("precision", "width"), [("auto", 10), pytest.param("pure_bf16", 6, marks=pytest.mark.slow)])
def test_moments_in_8_bits_learn_like_those_in_fp32(job: TrainJob, precision: str, width: int) -> None:
    job = dataclasses.replace(job, steps=60, checkpoint_every=100)
    exact = run(job)
    small = with_recipe(job, "small", moments="fp8", precision=precision)
    assert run(small).loss == pytest.approx(exact.loss, rel=0.03)
    model = trainable(small.model, small.optimizer, World())
    stepper = ResidentStepper(model, small, World())
    ones = torch.ones(1, L, dtype=torch.long)
    model(ones, ones).backward()
    stepper.optimizer.step()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    held = sum(
        t.nbytes
        for p in matrices
        for t in (p, p.grad, *stepper.optimizer.state[p].values())
        if t is not None and t.ndim
    )
    scales = sum(4 * p.numel() // p.shape[-1] for p in matrices)  # the rows are too short for blocks
    assert held == width * sum(p.numel() for p in matrices) + scales


@pytest.mark.parametrize("model", ["moe", "dense", "tied"])
@pytest.mark.parametrize("precision", ["auto", "pure_bf16"])
def test_moments_in_8_bits_survive_being_handed_over(job: TrainJob, home: Path, model: str, precision: str) -> None:
    recipe = Optimizer(lr=3e-3, batch_tokens=BATCH * L, weight_decay=0.1, moments="fp8", precision=precision)
    job = dataclasses.replace(
        job, model=home / model, optimizer=recipe, with_optimizer_state=True, load_balance=0.0, z_loss=0.0
    )
    first = variant(job, "first", steps=1)
    run(first)
    start, state = first.output, first.output / OPTIMIZER_FOLDER
    model_object = trainable(start, recipe, World())
    stepper = ResidentStepper(model_object, job, World())
    optimizer_state.load_optimizer_state(state, model_object, stepper.optimizer, World())
    optimizer_state.save_optimizer_state(model_object, stepper.optimizer, job.output / "again", World())
    for kind in KINDS:
        check_same(dict(open_checkpoint(job.output / "again" / kind)), dict(open_checkpoint(state / kind)))


# --- moments in the machine's memory


@pytest.mark.parametrize("precision", [pytest.param("auto", marks=pytest.mark.slow), "pure_bf16"])
@pytest.mark.parametrize("moments", ["auto", pytest.param("fp8", marks=pytest.mark.slow)])
def test_moments_in_the_machines_memory_change_no_bit(
    job: TrainJob, precision: str, moments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_module, "STEP_ELEMENTS", 256)  # several parts of a tensor
    job = dataclasses.replace(
        job, optimizer=job.optimizer.model_copy(update={"precision": precision, "moments": moments})
    )
    near, far = variant(job, "near"), with_recipe(job, "far", offload_moments=True)
    assert run(far).losses == run(near).losses
    check_same(weights(far.output), weights(near.output))


# --- blocks


def test_one_block_at_a_time_has_gradients_and_moments(job: TrainJob) -> None:
    job = with_recipe(job, "blocks", block_steps=2)
    model = trainable(job.model, job.optimizer, World())
    stepper = ResidentStepper(model, job, World())
    order: list[frozenset[str]] = []
    inputs = torch.randint(1, 60, (2, L), generator=torch.Generator().manual_seed(0))
    for step in range(16):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        stepper.select(step)
        model(inputs, inputs).backward()
        found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        stepper.optimizer.step()
        stepper.optimizer.zero_grad()
        assert {
            name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
        } == found
        assert {name for name, parameter in model.named_parameters() if parameter in stepper.optimizer.state} == found
        if step % 2:
            assert order[-1] == found
        else:
            order.append(frozenset(found))
            assert {int(state["step"]) for state in stepper.optimizer.state.values()} == {1}
    assert len({*order[:4]}) == 4  # two layers, the embedding and the head
    assert {*order[:4]} == {*order[4:]}
    assert sum(map(len, order[:4])) == len([*model.parameters()])


@given(st.integers(0, 50), st.integers(1, 5))
def test_the_block_depends_on_the_step_alone(step: int, every: int) -> None:
    def trained(steps: range) -> list[int]:
        model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(1, 1) for _ in range(5)])})
        wrapped = torch.nn.ModuleDict({"model": model})
        blocks = Blocks(wrapped, make(every))
        for each in steps:
            blocks.select(each)
        return [i for i, layer in enumerate(model["layers"]) if layer.weight.requires_grad]

    assert trained(range(step + 1)) == trained(range(step, step + 1))
    assert len(trained(range(step + 1))) == 1


def make(every: int) -> TrainJob:
    return TrainJob(
        stage="seed",
        name="seed",
        model=Path(),
        packed_dirs=(),
        output=Path(),
        checkpoints=Path(),
        steps=1,
        sequence_length=L,
        optimizer=Optimizer(block_steps=every),
        checkpoint_every=None,
        seed=3,
    )


def test_blocks_learn(job: TrainJob) -> None:
    job = with_recipe(dataclasses.replace(job, steps=60, checkpoint_every=100), "blocks", block_steps=3)
    losses = run(job).losses
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_a_frozen_routers_layer_stays_frozen(job: TrainJob, home: Path) -> None:
    job = with_recipe(
        dataclasses.replace(job, model=home / "dense", load_balance=0.0, z_loss=0.0), "blocks", block_steps=1
    )
    before = weights(job.model)
    run(job)
    after = weights(job.output)
    assert all(torch.equal(after[key], before[key]) for key in before if "mlp.gate.weight" in key)


# --- what all have in common


SMALL: list[dict[str, Any]] = [
    {"moments": "fp8"},
    {"moments": "fp8", "precision": "pure_bf16"},
    {"offload_moments": True},
    {"offload_moments": True, "precision": "pure_bf16"},
    {"block_steps": 2},
    {
        "block_steps": 3,
        "precision": "pure_bf16",
        "moments": "fp8",
        "offload_moments": True,
        "gradient_checkpointing": True,
    },
]


@pytest.mark.parametrize(
    "recipe",
    # the last one has all
    [pytest.param(each, id=str(each), marks=[] if each is SMALL[-1] else [pytest.mark.slow]) for each in SMALL],
)
def test_a_resumed_training_is_exact(job: TrainJob, recipe: dict[str, Any]) -> None:
    whole = with_recipe(job, "whole", **recipe)
    losses = run(whole).losses
    for stop in (2, 3, 5):
        part = with_recipe(job, f"part-{stop}", **recipe)
        assert not run(part, stop=stop_after(stop)).finished
        resumed = run(part)
        assert (resumed.restored_step, resumed.losses) == (stop, losses)
        check_same(weights(part.output), weights(whole.output))


@pytest.mark.parametrize("recipe", SMALL, ids=str)
def test_a_training_that_is_given_up_leaves_the_model_of_its_checkpoint(job: TrainJob, recipe: dict[str, Any]) -> None:
    # An unfinished training has a checkpoint after its last step, and a finished one too.
    job = dataclasses.replace(
        job, steps=4, checkpoint_every=2, optimizer=job.optimizer.model_copy(update={"schedule": "constant"})
    )
    whole = with_recipe(job, "whole", **recipe)
    run(whole)
    assert checkpoint.latest(whole.checkpoints) == 4
    part = dataclasses.replace(whole, output=job.output, steps=9)
    write_partial_result(part)
    check_same(weights(part.output), weights(whole.output))


@pytest.mark.parametrize("setting", [{"moments": "fp8"}, {"offload_moments": True}, {"block_steps": 5}])
def test_muon_refuses_what_it_cannot_do(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="needs the optimizer adamw"):
        Optimizer(name="muon", **setting)


def test_an_update_in_fp32_is_torchs_own() -> None:
    weight = torch.randn(300, generator=torch.Generator().manual_seed(0))
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    mine = RoundingAdamW([ours], lr=1e-2, weight_decay=0.1, offload=True)
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(5):
        ours.grad = torch.randn(300, generator=torch.Generator().manual_seed(step))
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    assert torch.equal(ours, theirs)


def test_memory_that_the_machine_cannot_lock_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: the result of the call was ignored, and each step copied moments through pages that can be moved."""

    class Runtime:
        def cudaHostRegister(self, *_: int) -> int:
            return 2

        def cudaGetErrorString(self, _: int) -> str:
            return "out of memory"

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    parameter = torch.nn.Parameter(torch.empty(2**18, device="meta"))
    with pytest.raises(
        ConfigError, match=r"optimizer\.offload_moments: True: .* lock 1 MiB .*out of memory.*ulimit -l"
    ):
        add_moments({}, parameter, fp8=False, offload=True)
