"""Which kernels a GPU runs, and how much memory a training takes on it."""

from __future__ import annotations

import statistics
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

from moedisco_ray.core.cards import peak_flops
from moedisco_ray.core.config import Architecture, FamilyName, Optimizer
from moedisco_ray.core.limits import LOGITS_BYTES
from moedisco_ray.models import grouped, hf_config
from moedisco_ray.models.attention import BY_DOCUMENT, MASKED, attend_within_documents
from moedisco_ray.models.expert_parallel import divided_experts
from moedisco_ray.models.speed import grouped_experts
from moedisco_ray.plan.cost import flops_per_token
from moedisco_ray.plan.memory import worker_memory
from moedisco_ray.plan.parameters import count_parameters
from moedisco_ray.training import TrainJob, World
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.cross_entropy import summed_cross_entropy
from moedisco_ray.training.sharding import autocast, compute_dtype, configured
from moedisco_ray.training.stepper import ResidentStepper

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SEQUENCE, VOCABULARY = 1024, 50_304
PLANNED_SHARE = 0.1
"""Largest difference between the measured peak of memory and the planned one, as a share of the planned one."""
BF16_ERROR = 0.01
"""Largest relative difference between two orders of the same sums in bf16."""
_ROUNDING = 8 * 2**20
"""Memory by which the allocator rounds up a few large tensors (bytes)."""


def architecture(experts: int) -> Architecture:
    """OLMoE-1B-7B with 4 of its 16 layers, as one of its sub-models."""
    return Architecture(
        hidden_size=2048,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        moe_intermediate_size=1024,
        num_experts=experts,
        num_experts_per_tok=min(experts, 8),
    )


def model_on(device: str, experts: int, recipe: Optimizer) -> PreTrainedModel:
    dtype = torch.bfloat16 if recipe.state == "bf16" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            hf_config("olmoe", architecture(experts), VOCABULARY, SEQUENCE, 0), dtype=dtype
        )
    if recipe.within_documents:
        attend_within_documents(model, device, compute_dtype(recipe, device))
    return configured(model, recipe)


def tokens_on(device: str, sequences: int) -> Tensor:
    return torch.arange(sequences * SEQUENCE, device=device).view(sequences, SEQUENCE) % VOCABULARY


def positions_of(tokens_BL: Tensor) -> Tensor:
    """Positions in documents of 300 tokens, which begin anew in each sequence."""
    return (torch.arange(tokens_BL.shape[1], device=tokens_BL.device) % 300).expand(tokens_BL.shape)


@pytest.mark.parametrize(
    "recipe",
    [
        {"precision": "pure_bf16"},
        {"precision": "pure_bf16", "gradient_checkpointing": True},
        {"precision": "pure_bf16", "micro_batch": 1, "moments": "fp8"},
        {"precision": "bf16"},
        {"precision": "pure_bf16", "within_documents": True},
        {"precision": "fp32", "within_documents": True},
    ],
    ids=lambda recipe: "-".join(map(str, recipe.values())),
)
@pytest.mark.parametrize("experts", [1, 4])
def test_a_submodel_takes_the_memory_that_the_plan_says(device: str, experts: int, recipe: dict[str, str]) -> None:
    optimizer = Optimizer(batch_tokens=2 * SEQUENCE, **recipe)
    plan = worker_memory("olmoe", architecture(experts), VOCABULARY, optimizer, sequence_length=SEQUENCE, gpu=1)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    job = TrainJob(
        stage="submodels",
        name="memory",
        model=Path(),
        packed_dirs=(),
        output=Path(),
        checkpoints=Path(),
        steps=2,
        sequence_length=SEQUENCE,
        optimizer=optimizer,
        checkpoint_every=None,
        load_balance=0.01,
        z_loss=0.001,
    )
    step = ResidentStepper(model_on(device, experts, optimizer), job, World(device=device))
    for _ in range(2):
        step(
            MicroBatch(part, part, job.step_tokens, None, positions_of(part) if optimizer.within_documents else None)
            for part in tokens_on(device, 2).split(optimizer.micro_batch or 2)
        )
    peak = torch.cuda.max_memory_allocated() - before
    assert peak == pytest.approx(plan.total - plan.overhead, rel=PLANNED_SHARE)
    assert torch.cuda.max_memory_reserved() - before < plan.total


def test_a_submodel_reaches_45_percent_of_the_cards_speed(device: str) -> None:
    peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        pytest.skip("the card's peak speed is not known")
    sequences = 8
    optimizer = Optimizer(batch_tokens=sequences * SEQUENCE, precision="pure_bf16")
    job = TrainJob(
        stage="submodels",
        name="speed",
        model=Path(),
        packed_dirs=(),
        output=Path(),
        checkpoints=Path(),
        steps=20,
        sequence_length=SEQUENCE,
        optimizer=optimizer,
        checkpoint_every=None,
    )
    step, tokens, seconds = (
        ResidentStepper(model_on(device, 1, optimizer), job, World(device=device)),
        tokens_on(device, sequences),
        [],
    )
    for _ in range(job.steps):
        began = time.perf_counter()
        step([MicroBatch(tokens, tokens, job.step_tokens, None)])
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    parameters = count_parameters("olmoe", architecture(1), VOCABULARY)
    flops = flops_per_token(parameters, architecture(1), SEQUENCE, checkpointing=False) * job.step_tokens
    assert flops / statistics.median(seconds[5:]) / peak >= 0.45


def test_experts_that_are_divided_over_nccl_are_all_experts(device: str, tmp_path: Path) -> None:
    experts = model_on(device, 4, Optimizer(precision="pure_bf16")).model.layers[0].mlp.experts
    x_TD = torch.randn(64, 2048, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight_TK, expert_TK = (
        torch.rand(64, 2, device=device, dtype=torch.bfloat16),
        torch.rand(64, 4, device=device).topk(2).indices,
    )
    expected = grouped_experts(experts, x_TD, expert_TK, weight_TK)
    [expected_grad] = torch.autograd.grad(expected.float().square().sum(), x_TD)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        found = divided_experts(experts, x_TD, expert_TK, weight_TK, group=dist.group.WORLD, compute=grouped_experts)
        [found_grad] = torch.autograd.grad(found.float().square().sum(), x_TD)
    finally:
        dist.destroy_process_group()
    assert error(found, expected.double()) < BF16_ERROR
    assert error(found_grad, expected_grad.double()) < BF16_ERROR


def test_experts_run_as_one_product_on_cards_that_can(device: str) -> None:
    model = model_on(device, 4, Optimizer(precision="pure_bf16"))
    tokens = tokens_on(device, 1)
    capability = torch.cuda.get_device_capability()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.autograd.backward(model(tokens, tokens))
    found = {event.key for event in profiler.key_averages()}
    assert ("aten::_grouped_mm" in found) == (capability[0] in (9, 10))
    assert "transformers::grouped_mm_fallback" not in found


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
def test_experts_one_after_the_other_are_all_experts_and_wait_once(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: str
) -> None:
    experts = model_on(device, 4, Optimizer(precision=precision)).model.layers[0].mlp.experts
    dtype = experts.down_proj.dtype
    x_TD = torch.randn(64, 2048, device=device, dtype=dtype, requires_grad=True)
    weight_TK = torch.rand(64, 2, device=device, dtype=dtype)
    expert_TK, found = torch.rand(64, 4, device=device).topk(2).indices, []
    for kernel in (True, False):  # torch computes one after the other too where it has no kernel
        monkeypatch.setattr(grouped, "has_kernel", lambda _, kernel=kernel: kernel)
        y_TD = grouped_experts(experts, x_TD, expert_TK, weight_TK)
        found.append([y_TD, *torch.autograd.grad(y_TD.float().square().sum(), [x_TD, *experts.parameters()])])
    for theirs, ours in zip(*found, strict=True):
        assert error(ours, theirs.double()) < (1e-5 if precision == "fp32" else BF16_ERROR)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        torch.autograd.backward(grouped_experts(experts, x_TD, expert_TK, weight_TK).sum())
        torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in waits if "synchronizing" in str(each.message)]) == 1


def test_attention_stores_no_scores(device: str) -> None:
    model = model_on(device, 1, Optimizer(precision="pure_bf16"))
    tokens = tokens_on(device, 1)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(tokens, tokens)
    found = {event.key for event in profiler.key_averages() if "scaled_dot_product_" in event.key}
    assert found & {f"aten::_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")}
    assert "aten::_scaled_dot_product_attention_math" not in found


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral"])
def test_packed_documents_run_without_a_mask_on_cards_that_can(device: str, family: FamilyName, precision: str) -> None:
    sizes = architecture(1).model_copy(update={"num_key_value_heads": 16 if family == "olmoe" else 4})
    recipe = Optimizer(precision=precision, within_documents=True)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            hf_config(family, sizes, VOCABULARY, SEQUENCE, 0),
            dtype=torch.bfloat16 if recipe.state == "bf16" else torch.float32,
        )
    attend_within_documents(model, device, compute_dtype(recipe, device))
    implementation = BY_DOCUMENT if torch.cuda.get_device_capability() >= (8, 0) else MASKED
    assert model.config._attn_implementation == implementation
    configured(model, recipe)
    if family == "mixtral":
        model.config.sliding_window = 200
    tokens, found = tokens_on(device, 2), {}
    for each in (implementation, MASKED):
        model.config._attn_implementation = each
        with autocast(recipe, World(device=device)), profile(activities=[ProfilerActivity.CPU]) as profiler:
            loss = model(tokens, tokens, positions_of(tokens))
        kernels = {event.key for event in profiler.key_averages()}
        assert ("aten::_flash_attention_forward" in kernels) == (each == BY_DOCUMENT)
        assert "aten::_scaled_dot_product_attention_math" not in kernels
        weights = (model.get_input_embeddings().weight, model.model.layers[0].self_attn.v_proj.weight)
        found[each] = torch.autograd.grad(loss, weights)
    for ours, masked in zip(found[implementation], found[MASKED], strict=True):
        assert error(ours, masked.double()) < 3 * BF16_ERROR


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_the_cpu_does_not_wait_for_the_card_in_a_layer_of_experts(device: str, precision: str) -> None:
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("torch has no kernel for grouped products on this card")
    optimizer = Optimizer(precision=precision)
    block = model_on(device, 16, optimizer).model.layers[0].mlp
    dtype = torch.bfloat16 if optimizer.state == "bf16" else torch.float32
    x_BLD = torch.randn(1, SEQUENCE, 2048, device=device, dtype=dtype, requires_grad=True)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        torch.autograd.backward(block(x_BLD).sum())  # libraries may wait when they are first used
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.backward(block(x_BLD).sum())
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_in_tiles_is_exact_and_takes_64_mib(device: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    exact_TD = torch.randn(4096, 256, generator=random).to(device, dtype)
    exact_VD = (torch.randn(32_000, 256, generator=random) / 16).to(device, dtype)
    targets_T = torch.randint(32_000, (4096,), generator=random).to(device)
    targets_T[::7] = -100
    plain = losses_and_gradients(exact_TD, exact_VD, targets_T)  # which also makes cuBLAS allocate its workspace
    double = losses_and_gradients(exact_TD.double(), exact_VD.double(), targets_T)

    hidden_TD, head_VD = exact_TD.clone().requires_grad_(), exact_VD.clone().requires_grad_()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = summed_cross_entropy(hidden_TD, head_VD, targets_T)
    torch.autograd.backward(loss)
    peak = torch.cuda.max_memory_allocated() - before
    # gradients in fp32, and in the dtype
    assert peak < LOGITS_BYTES + 6 * (hidden_TD.numel() + head_VD.numel()) + _ROUNDING
    assert hidden_TD.grad is not None
    assert head_VD.grad is not None
    for found, rounded, true in zip((loss.detach(), hidden_TD.grad, head_VD.grad), plain, double, strict=True):
        assert error(found, true) < max(1e-6, 1.5 * error(rounded, true))


def losses_and_gradients(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients from the logits of all tokens at once."""
    hidden_TD, head_VD = hidden_TD.detach().requires_grad_(), head_VD.detach().requires_grad_()
    logits_TV = linear(hidden_TD, head_VD)
    loss = cross_entropy(
        logits_TV.float() if logits_TV.dtype is torch.bfloat16 else logits_TV, targets_T, reduction="sum"
    )
    return loss.detach(), *torch.autograd.grad(loss, (hidden_TD, head_VD))


def error(found: Tensor, exact: Tensor) -> float:
    """Relative error of a tensor."""
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))
