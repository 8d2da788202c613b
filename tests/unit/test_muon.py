"""Muon: the parameters it trains, its updates against torch's, resuming, and its state in the next training."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import BATCH, RECIPE, L, run, stop_after, variant, weights, write_shard, write_tiny
from torch import nn

from moedisco_ray.core.config import FAMILIES, Architecture, FamilyName, LowMemoryPool, Optimizer, RunConfig
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import check_same, hf_config, load_model, skeleton
from moedisco_ray.models.optimizer_state import OPTIMIZER_FOLDER, open_optimizer_state
from moedisco_ray.plan.cost import optimizer_flops_per_token
from moedisco_ray.plan.muon_flops import muon_flops
from moedisco_ray.training import TrainJob, World
from moedisco_ray.training.muon import MOMENTUM, Muon, is_matrix, orthogonalised
from moedisco_ray.training.optimizer import adamw, make_optimizer

MUON = RECIPE.model_copy(update={"name": "muon", "lr": 1e-3})


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    torch.set_num_threads(1)
    write_shard(tmp_path / "shard")
    write_tiny(tmp_path / "moe", 4)
    return TrainJob(
        stage="finetune",
        name="finetune",
        model=tmp_path / "moe",
        packed_dirs=(tmp_path / "shard",),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=8,
        sequence_length=L,
        optimizer=MUON,
        checkpoint_every=3,
        keep=2,
        seed=5,
        load_balance=0.02,
        z_loss=0.01,
        log_every=2,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrices_are_those_of_the_layers_without_routers(family: str) -> None:
    sizes = Architecture(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = skeleton(hf_config(family, sizes, 64, 16, 0))
    chosen = {name.removeprefix("model.layers.0.") for name, each in model.named_parameters() if is_matrix(name, each)}
    page = DECLARATIONS[family]
    attention = (
        ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
        if page.attention.latent
        else [f"{each}_proj" for each in "qkvo"]
    )
    mixer = {f"self_attn.{each}.weight" for each in attention}
    if page.recurrence is not None:
        mixer = {f"linear_attn.{each}.weight" for each in (*page.recurrence.projections, "out_proj")}
    block = next(name for name, each in model.model.layers[0].named_children() if hasattr(each, "experts"))
    expected = mixer | {f"{block}.experts.{each}_proj" for each in ("gate_up", "down")}
    if page.shared is not None:
        expected |= {f"mlp.{page.shared.module}.{each}_proj.weight" for each in ("gate", "up", "down")}
    assert chosen == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_the_operations_of_muons_matrices(family: FamilyName) -> None:
    """Before: three functions counted them, the plan's by a formula that was 30 % off for latent attention."""
    sizes = Architecture(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
    )
    recipe, exact = Optimizer(name="muon", batch_tokens=512), 0
    for name, each in skeleton(hf_config(family, sizes, 64, 16, 0)).named_parameters():
        if is_matrix(name, each):
            halves = 2 if name.endswith("gate_up_proj") and not DECLARATIONS[family].interleaved else 1
            *experts, rows, columns = each.shape
            short, long = sorted((rows // halves, columns))
            exact += math.prod(experts) * halves * 5 * (4 * short**2 * long + 2 * short**3)
    assert muon_flops(family, sizes) == exact
    pool = LowMemoryPool(gpu=1, card="L4")
    planned = optimizer_flops_per_token(family, sizes, recipe, pool)
    assert planned == pytest.approx(exact / 512 * pool.flops(4) / pool.flops(1))
    assert not optimizer_flops_per_token(family, sizes, Optimizer(), pool)


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), count=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_singular_vectors_stay_and_singular_values_become_about_one(
    rows: int, columns: int, count: int, seed: int
) -> None:
    left, _ = torch.linalg.qr(torch.randn(count, rows, rows, generator=torch.Generator().manual_seed(seed)))
    right, _ = torch.linalg.qr(torch.randn(count, columns, columns, generator=torch.Generator().manual_seed(seed + 1)))
    rank = min(rows, columns)
    values = torch.linspace(1, 0.1, rank)
    found = orthogonalised(left[:, :, :rank] * values @ right[:, :rank])
    inner = left[:, :, :rank].mT @ found @ right[:, :rank].mT
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.6
    assert diagonal.max() < 1.3
    torch.testing.assert_close(inner, torch.diag_embed(diagonal), rtol=0, atol=1e-4)


def test_every_expert_is_trained_as_torch_trains_a_matrix_of_its_own(job: TrainJob) -> None:
    model = load_model(job.model)
    experts = model.model.layers[0].mlp.experts
    recipe = Optimizer(name="muon", lr=0.1, batch_tokens=BATCH * L)
    optimizer = make_optimizer(model, dataclasses.replace(job, optimizer=recipe), World())
    half = experts.gate_up_proj.shape[1] // 2
    parts = [  # gate, up and down projection of two experts
        torch.nn.Parameter(each.detach().clone())
        for e in (0, 3)
        for each in (experts.gate_up_proj[e, :half], experts.gate_up_proj[e, half:], experts.down_proj[e])
    ]
    reference = torch.optim.Muon(parts, lr=0.1, weight_decay=0.01, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        gradients = [torch.randn(each.shape, generator=random) for each in (experts.gate_up_proj, experts.down_proj)]
        experts.gate_up_proj.grad, experts.down_proj.grad = (each.clone() for each in gradients)
        for each, gradient in zip(
            parts,
            (piece for e in (0, 3) for piece in (gradients[0][e, :half], gradients[0][e, half:], gradients[1][e])),
            strict=True,
        ):
            each.grad = gradient.clone()
        optimizer.step()
        reference.step()
    ours = [
        each
        for e in (0, 3)
        for each in (experts.gate_up_proj[e, :half], experts.gate_up_proj[e, half:], experts.down_proj[e])
    ]
    for mine, theirs in zip(ours, parts, strict=True):  # torch iterates in bf16
        assert torch.linalg.vector_norm(mine - theirs) < 0.02 * torch.linalg.vector_norm(theirs)


def newton_schulz(update_AB: torch.Tensor) -> torch.Tensor:
    """Five steps X <- a X + b (X X') X + c (X X')^2 X on one matrix, in float64, as Jordan et al. write them."""
    transposed = len(update_AB) > len(update_AB[0])
    x_AB = update_AB.T if transposed else update_AB
    x_AB = x_AB / x_AB.square().sum().sqrt()
    for _ in range(5):
        gram_AA = x_AB @ x_AB.T
        x_AB = 3.4445 * x_AB - 4.7750 * gram_AA @ x_AB + 2.0315 * gram_AA @ gram_AA @ x_AB
    return x_AB.T if transposed else x_AB


def test_every_matrix_is_updated_as_written_by_hand(job: TrainJob) -> None:
    model = load_model(job.model)
    recipe = Optimizer(name="muon", lr=0.1, weight_decay=0.02, batch_tokens=BATCH * L)
    optimizer = make_optimizer(model, dataclasses.replace(job, optimizer=recipe), World())
    layer = model.model.layers[0]
    gate_up, down, query = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.self_attn.q_proj.weight
    half = gate_up.shape[1] // 2

    def matrices(gate_up_EFD: torch.Tensor, down_EDF: torch.Tensor, query_AB: torch.Tensor) -> list[torch.Tensor]:
        experts = [part for gate_up_FD in gate_up_EFD for part in (gate_up_FD[:half], gate_up_FD[half:])]
        return [each.double() for each in (*experts, *down_EDF, query_AB)]

    expected = [each.clone() for each in matrices(gate_up.detach(), down.detach(), query.detach())]
    momenta = [torch.zeros_like(each) for each in expected]
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        for each in (gate_up, down, query):
            each.grad = torch.randn(each.shape, generator=random)
        gradients = matrices(gate_up.grad, down.grad, query.grad)
        optimizer.step()
        for number, gradient_AB in enumerate(gradients):
            momenta[number] = 0.95 * momenta[number] + 0.05 * gradient_AB
            nesterov_AB = 0.05 * gradient_AB + 0.95 * momenta[number]
            rms = 0.2 * max(gradient_AB.shape) ** 0.5
            expected[number] = expected[number] * (1 - 0.1 * 0.02) - 0.1 * rms * newton_schulz(nesterov_AB)
    for found, by_hand in zip(matrices(gate_up.detach(), down.detach(), query.detach()), expected, strict=True):
        torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-5)


def test_it_learns_with_a_smaller_state_and_resumes_bit_for_bit(job: TrainJob) -> None:
    job = dataclasses.replace(job, optimizer=MUON.model_copy(update={"precision": "pure_bf16"}))
    long = run(
        variant(job, "long", steps=40, checkpoint_every=100, optimizer=job.optimizer.model_copy(update={"lr": 6e-3}))
    )
    assert long.loss < long.losses[0] - 0.5
    whole = run(job)
    again = variant(job, "again")
    assert not run(again, stop=stop_after(5)).finished
    resumed = run(again)
    assert resumed.restored_step == 5
    assert resumed.losses == whole.losses
    check_same(weights(job.output), weights(again.output))


def test_equal_matrices_are_rounded_with_bits_of_their_own() -> None:
    torch.manual_seed(0)
    weight_AB, gradient_AB = torch.randn(2, 32, 32).bfloat16()
    pair = [nn.Parameter(weight_AB.clone()) for _ in range(2)]
    recipe = MUON.model_copy(update={"precision": "pure_bf16"})
    optimizer = Muon(
        [{"params": pair, "halves": 1}, {"params": [nn.Parameter(torch.ones(2))]}],
        recipe,
        functools.partial(adamw, recipe=recipe, seed=0),
        0,
        0,
    )
    for each in pair:
        each.grad = gradient_AB.clone()
    optimizer.step()
    one, other = (each.detach().float() - weight_AB.float() for each in pair)
    assert not torch.equal(one, other)
    assert (one - other).abs().max() <= weight_AB.float().abs().max() / 64  # two neighbours of the same exact value


def test_a_worker_without_experts_makes_steps() -> None:
    """With more workers than experts, sharding gives some of them a stack of no matrices."""
    stack = nn.Parameter(torch.empty(0, 8, 4))
    optimizer = Muon(
        [{"params": [stack], "halves": 2}, {"params": [nn.Parameter(torch.ones(2))]}],
        MUON,
        functools.partial(adamw, recipe=MUON, seed=0),
        0,
        0,
    )
    for _ in range(2):
        stack.grad = torch.empty_like(stack)
        optimizer.step()
    assert int(optimizer.state[stack]["step"]) == 2


def test_the_next_training_continues_from_the_momentum(job: TrainJob) -> None:
    first = dataclasses.replace(job, with_optimizer_state=True)
    run(first)
    stored = open_optimizer_state(first.output / OPTIMIZER_FOLDER)
    assert stored is not None
    assert stored.steps == 8
    expert = "model.layers.0.mlp.experts.1.down_proj.weight"
    assert stored.tensors["exp_avg"][expert].any()
    assert not stored.tensors["exp_avg_sq"][expert].any()
    assert stored.tensors["exp_avg_sq"]["lm_head.weight"].any()
    after = variant(job, "after", model=first.output, optimizer_state=first.output / OPTIMIZER_FOLDER, steps=1)
    without = variant(job, "without", model=first.output, steps=1)
    run(after)
    run(without)
    found = weights(after.output)[expert]
    assert not torch.equal(found, weights(without.output)[expert])


def test_one_optimizer_cannot_continue_from_the_state_of_another() -> None:
    mixed = {
        "name": "mixed",
        "corpus": {"sources": [{"path": "embedded"}]},
        "submodels": {"optimizer": {"name": "muon"}},
    }
    with pytest.raises(
        ValueError, match=r"finetune\.optimizer\.name adamw cannot continue .*keep_optimizer_state=false"
    ):
        RunConfig.model_validate(mixed)
    RunConfig.model_validate(mixed | {"finetune": {"keep_optimizer_state": False}})
