"""4-bit weights under adapters (`lora.base: nf4`), with bitsandbytes and dense weights as references."""

from __future__ import annotations

import contextlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_steps import LiveBytes
from scipy.stats import norm
from tiny_training import BATCH, L, V, write_tiny
from torch import Tensor, nn

from moedisco_ray.core.config import Architecture, Lora, Optimizer
from moedisco_ray.core.limits import NF4_BLOCK
from moedisco_ray.models import hf_config, load_model, save_model, skeleton
from moedisco_ray.plan.adapter_memory import NF4_BYTES
from moedisco_ray.training import World
from moedisco_ray.training.lora import SumsAgain, adapters, unadapted_tensors
from moedisco_ray.training.nf4 import LEVELS, Nf4
from moedisco_ray.training.sharding import trainable

NF4 = Lora(rank=3, alpha=6.0, base="nf4")
RECIPE = Optimizer(lr=2e-2, batch_tokens=BATCH * L)
SHAPES = [(4, 48, 32), (3, 64, 4096), (512, 640), (7, 13), (2**12, 2**10 + 8)]


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def rounded(weight: Tensor) -> Nf4:
    found = Nf4(weight)
    found.store(weight)
    return found


def error(found: Tensor, weight: Tensor) -> float:
    return float((found.float() - weight.float()).norm() / weight.float().norm())


# --- the numbers


def test_the_levels_are_those_of_the_paper() -> None:
    most = 0.9677083  # the last quantile, in appendix E and in the authors' code
    below = [-norm.ppf(most + (0.5 - most) * i / 7) for i in range(7)]
    above = [norm.ppf(most + (0.5 - most) * i / 8) for i in range(8)]
    expected = [level / above[0] for level in (*below, 0.0, *reversed(above))]
    assert pytest.approx(expected, abs=1e-6) == LEVELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_is_rounded_to_the_nearest_level_of_its_block(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    found = rounded(weight).dense()
    assert (found.shape, found.dtype) == (weight.shape, dtype)
    flat = torch.nn.functional.pad(weight.flatten().float(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = flat.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(LEVELS)
    nearest = levels[(flat[..., None] / scale[..., None] - levels).abs().argmin(dim=-1)] * scale
    exact = nearest.flatten()[: weight.numel()].view(shape)
    assert error(found, exact) < 0.01  # the scales are rounded too
    assert error(found, weight) < 1.01 * error(exact, weight) < 0.1


def test_zeros_stay_zeros_and_a_large_block_harms_no_other() -> None:
    weight = weight_of((NF4_BLOCK * 1024,))
    weight[:NF4_BLOCK] = 0
    weight[NF4_BLOCK : 2 * NF4_BLOCK] *= 1000
    found = rounded(weight).dense()
    assert not found[:NF4_BLOCK].any()
    assert error(found[256 * NF4_BLOCK :], weight[256 * NF4_BLOCK :]) < 0.1
    assert not rounded(torch.zeros(3, NF4_BLOCK)).dense().any()


def test_a_weight_takes_the_bytes_that_the_plan_counts() -> None:
    weight = weight_of((4, 512, 256))
    assert sum(each.nbytes for each in rounded(weight).buffers()) == pytest.approx(NF4_BYTES * weight.numel(), rel=1e-4)
    assert not rounded(weight).state_dict()  # checkpoints leave it out


@pytest.mark.ecosystem("Training: 4-bit weights of QLoRA, as bitsandbytes rounds them", "bitsandbytes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_bitsandbytes_rounds_to_the_same_codes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    weight = weight_of(shape, dtype)
    found = rounded(weight)
    # In one row: 0.50.2 reads a wrong scale on a CPU if a block is longer than a row.
    codes, state = theirs.quantize_4bit(weight.flatten(), quant_type="nf4", compress_statistics=True)
    assert torch.equal(codes.flatten(), found.codes_P[: len(codes)])
    again = theirs.dequantize_4bit(codes, state).view(shape)
    assert error(found.dense(), again) < 0.02
    assert error(found.dense(), weight) < 1.01 * error(again, weight)


# --- a model


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("nf4")
    write_tiny(home / "moe", 4)
    write_tiny(home / "dense", 1)
    return home / "moe"


def inputs() -> Tensor:
    return torch.randint(1, V, (2, L), generator=torch.Generator().manual_seed(0))


def with_values(model: Any) -> Any:
    source = torch.Generator().manual_seed(1)
    for adapter in adapters(model).values():
        for matrix in (adapter.a_ERI, adapter.b_EOR):
            matrix.data.copy_(torch.randn(matrix.shape, generator=source) * 0.05)
    return model


def step(model: Any, precision: str) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients, with the sums computed again in the backward pass."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), SumsAgain(model).saving():
        loss = model(inputs(), inputs())
    loss.backward()
    return loss, [each.grad for each in model.parameters() if each.grad is not None]


@pytest.mark.parametrize("start", ["moe", "dense"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_gradients_are_those_of_dense_weights_with_the_rounded_values(
    moe: Path, start: str, checkpointing: bool, precision: Any
) -> None:
    recipe = RECIPE.model_copy(update={"precision": precision, "gradient_checkpointing": checkpointing})
    ours = with_values(trainable(moe.parent / start, recipe, World(), lora=NF4))
    dense = with_values(trainable(moe.parent / start, recipe, World(), lora=NF4.model_copy(update={"base": "full"})))
    frozen = unadapted_tensors(dense)
    for name, adapter in adapters(ours).items():
        assert adapter.base is not None
        assert not torch.equal(frozen[name], adapter.base.dense())
        frozen[name].data.copy_(adapter.base.dense())
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        reference = dense(inputs(), inputs())
    reference.backward()  # autograd keeps the sums
    loss, gradients = step(ours, precision)
    assert torch.equal(loss, reference)
    assert len(gradients) == 2 * len(adapters(ours))
    assert all(map(torch.equal, gradients, (each.grad for each in dense.parameters() if each.grad is not None)))


@pytest.mark.parametrize("base", ["full", "nf4"])
@pytest.mark.parametrize("start", ["moe", "dense"])
@pytest.mark.parametrize("again", [False, True])
def test_no_sum_is_kept_between_the_passes(moe: Path, start: str, base: Any, again: bool) -> None:
    model = with_values(trainable(moe.parent / start, RECIPE, World(), lora=NF4.model_copy(update={"base": base})))
    sums: list[weakref.ref[torch.UntypedStorage]] = []

    def note(adapter: nn.Module, given: Any, found: Tensor) -> None:
        sums.append(weakref.ref(found.untyped_storage()))

    for adapter in adapters(model).values():
        adapter.register_forward_hook(note)
    with SumsAgain(model).saving() if again else contextlib.nullcontext():
        loss = model(inputs(), inputs())
    alive = sum(each() is not None for each in sums)
    assert len(sums) == len(adapters(model))
    assert alive == (0 if again else len(sums) - 3)  # no gradient is needed below the first queries, keys and values
    loss.backward()
    assert not any(each() is not None for each in sums)


def test_a_model_is_loaded_without_ever_being_there_in_full(tmp_path: Path) -> None:
    sizes = Architecture(
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=2,
        moe_intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
    )
    config = hf_config("qwen3_moe", sizes, V, L, 0)
    save_model(type(skeleton(config))(config), tmp_path / "start")
    full = sum(each.nbytes for each in load_model(tmp_path / "start").parameters())
    with LiveBytes() as live:
        model = trainable(tmp_path / "start", RECIPE, World(), lora=NF4)
    assert sum(each.nbytes for each in (*model.parameters(), *model.buffers())) < 0.4 * full  # adapters are in fp32
    assert live.peak < 0.7 * full
