"""Tokens of packed documents attend to their own document alone: by a mask, or by a kernel for each document.

The kernel runs on GPUs only. Here a stand-in with its interface takes its place; `tests/gpu/test_kernels_gpu.py` runs
the kernel.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import RECIPE, L, V, ignore, never, run, stop_after, variant, weights, write_shard, write_tiny
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from moedisco_ray.core.config import FamilyName, Optimizer, check_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.families import DECLARATIONS, FAMILIES
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.models import attention, check_same
from moedisco_ray.models.attention import BY_DOCUMENT, MASKED, attend_within_documents, document_bounds
from moedisco_ray.training import TrainJob, World, train
from moedisco_ray.training.batches import document_positions
from moedisco_ray.training.sharding import autocast, trainable

WITHIN = RECIPE.model_copy(update={"within_documents": True})
START = 0
ERROR = 1e-6
"""Largest relative difference between documents that are packed and documents alone, in fp64."""
WINDOWS: dict[FamilyName, dict[str, Any]] = {
    "mixtral": {"sliding_window": 4},
    "qwen2_moe": {
        "sliding_window": 4,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3_moe": {"sliding_window": 4, "use_sliding_window": True},
    "gpt_oss": {"sliding_window": 4},
}
"""Configuration fields with which models of a family have sliding windows."""
CASES = [*((family, {}) for family in FAMILIES if DECLARATIONS[family].recurrence is None), *WINDOWS.items()]


def by_document(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """What torch's `varlen_attn` computes, one document after the other."""
    bounds = settings["cu_seq_q"].tolist()
    assert settings["max_q"] >= max(end - start for start, end in itertools.pairwise(bounds))
    before, after = settings["window_size"]
    assert after == 0
    found = []
    for start, end in itertools.pairwise(bounds):
        order = torch.arange(end - start)
        distance = order[:, None] - order
        mask = (distance >= 0) & ((distance <= before) | (before < 0))
        q, k, v = (each[start:end].transpose(0, 1) for each in (query, key, value))
        found.append(
            functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=settings["scale"], enable_gqa=settings["enable_gqa"]
            ).transpose(0, 1)
        )
    return torch.cat(found)


@pytest.fixture(params=[MASKED, BY_DOCUMENT])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(attention, "varlen_attn", by_document)
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: request.param == BY_DOCUMENT)
    return str(request.param)


def documents() -> list[Tensor]:
    random = np.random.default_rng(7)
    return [torch.tensor([START, *random.integers(1, V, length)]) for length in (3, 9, 1, 6, 11)]


def made(directory: Path, family: FamilyName, changes: dict[str, Any], recipe: Optimizer = WITHIN) -> PreTrainedModel:
    write_tiny(directory, 4, family=family)
    write_json(directory / "config.json", {**read_json(directory / "config.json"), **changes})
    return trainable(directory, recipe, World())


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradients, which are removed from the model."""
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
def test_packed_documents_have_the_losses_and_gradients_of_documents_alone(
    tmp_path: Path, implementation: str, family: FamilyName, changes: dict[str, Any]
) -> None:
    model = made(tmp_path, family, changes).double()
    assert model.config._attn_implementation == ("eager" if family == "gpt_oss" else implementation)
    packed_L = torch.cat(documents())
    # Two sequences, the second of which begins inside a document.
    half = len(packed_L) // 2
    tokens_BL = packed_L[: 2 * half].view(2, half)
    targets_BL = torch.cat([packed_L[1:], torch.tensor([START])])[: 2 * half].view(2, half)
    targets_BL = targets_BL.masked_fill(targets_BL == START, -100)
    together = model(tokens_BL, targets_BL, document_positions(tokens_BL == START))
    torch.autograd.backward(together)
    packed = gradients(model)
    losses = []
    for tokens_L, targets_L in zip(tokens_BL, targets_BL, strict=True):
        starts = [0, *(place for place in range(1, half) if tokens_L[place] == START), half]
        for start, end in itertools.pairwise(starts):
            losses.append(model(tokens_L[None, start:end], targets_L[None, start:end]))
            torch.autograd.backward(losses[-1])
    assert len(losses) > 5
    assert together.item() == pytest.approx(sum(loss.item() for loss in losses), rel=ERROR)
    alone = gradients(model)
    assert packed.keys() == alone.keys()
    errors = {
        name: float((packed[name] - each).norm() / each.norm()) for name, each in alone.items() if each.norm() > 0
    }
    assert {name: error for name, error in errors.items() if not error < ERROR} == {}


def test_recurrent_layers_which_carry_a_state_on_are_refused(tmp_path: Path) -> None:
    reason = r"does not hold in recurrent layers, which carry a state from one document to the next; set it to false"
    raw: dict[str, Any] = {
        "name": "x",
        "corpus": {"sources": [{"path": "embedded"}]},
        "model": {"family": "qwen3_next"},
        "finetune": {"optimizer": {"within_documents": True}},
        "pools": {"low_memory": {}, "high_memory": {}},
    }
    with pytest.raises(ConfigError, match=rf"finetune\.optimizer\.within_documents.*{reason}"):
        check_config(raw)
    write_tiny(tmp_path / "start", 4, family="qwen3_next")
    raw |= {"model": {"init": {"checkpoint": str(tmp_path / "start")}}, "tokens": {"seed_share": 0}}
    with pytest.raises(ConfigError, match=rf"^finetune\.optimizer\.within_documents: true {reason}"):
        check_config(raw)
    with pytest.raises(ConfigError, match=r"does not hold in layers of kind linear_attention, which carry a state"):
        trainable(tmp_path / "start", WITHIN, World())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_all_layers_share_one_mask_in_the_dtype_of_their_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    seen: list[Tensor] = []
    fused = functional.scaled_dot_product_attention

    def watched(query: Tensor, *args: Any, attn_mask: Tensor, **settings: Any) -> Tensor:
        seen.append(attn_mask)
        return fused(query, *args, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    recipe = WITHIN.model_copy(update={"precision": precision})
    model = made(tmp_path, "qwen3_moe", {}, recipe)
    tokens_BL = torch.cat(documents())[None]
    with autocast(recipe, World()):
        model(tokens_BL, tokens_BL, document_positions(tokens_BL == START))
    assert len(seen) == 2
    assert len({mask.data_ptr() for mask in seen}) == 1
    assert seen[0].dtype is (torch.float32 if precision == "fp32" else torch.bfloat16)


def test_bounds_are_the_first_tokens_of_documents_up_to_a_power_of_two() -> None:
    positions_BL = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]])
    bounds_N = document_bounds(positions_BL)
    assert bounds_N.tolist() == [0, 3, 4, 6, 8, 12, 12, 12]
    assert bounds_N.dtype is torch.int32
    for count in range(1, 10):
        found = document_bounds(torch.zeros(1, count)).tolist()
        assert found[: count + 1] == list(range(count + 1))
        assert len(found).bit_count() == 1


def test_a_sequence_without_bounds_is_one_document(tmp_path: Path, implementation: str) -> None:
    usual = made(tmp_path / "usual", "qwen3_moe", {}, RECIPE)
    within = made(tmp_path / "within", "qwen3_moe", {})
    assert within.config._attn_implementation == implementation
    tokens_BL = torch.arange(1, 33).view(2, 16)
    torch.testing.assert_close(within(tokens_BL, tokens_BL), usual(tokens_BL, tokens_BL))


def test_layers_that_carry_a_state_are_refused(tmp_path: Path) -> None:
    model = made(tmp_path, "qwen2_moe", {}, RECIPE)
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(
        ConfigError, match=r"optimizer\.within_documents.*layers of kind linear_attention.*set it to false"
    ):
        attend_within_documents(model, "cpu", torch.float32)


def test_a_kernel_that_is_missing_or_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_window(*args: Tensor, **settings: Any) -> Tensor:
        return by_document(*args, **{**settings, "window_size": (-1, 0)})

    def across(*args: Tensor, **settings: Any) -> Tensor:
        return by_document(*args, **{**settings, "cu_seq_q": settings["cu_seq_q"][[0, -1]], "max_q": 48})

    def earlier(query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, is_causal: bool) -> Tensor:
        raise AssertionError

    def missing(*_: Tensor, **__: Any) -> Tensor:
        raise NotImplementedError("no kernel for this device")

    for kernel, works in ((by_document, True), *((each, False) for each in (without_window, across, earlier, missing))):
        monkeypatch.setattr(attention, "varlen_attn", kernel)
        assert attention._kernel_works.__wrapped__("cpu") is works, kernel


def test_a_cpu_has_no_kernel(tmp_path: Path) -> None:
    assert (
        made(tmp_path, "qwen3_moe", {}, WITHIN.model_copy(update={"precision": "bf16"})).config._attn_implementation
        == MASKED
    )


# --- trainings


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    write_shard(tmp_path / "shard")
    write_tiny(tmp_path / "moe", 4, family="qwen2_moe")
    return TrainJob(
        stage="finetune",
        name="within",
        model=tmp_path / "moe",
        packed_dirs=(tmp_path / "shard",),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=6,
        sequence_length=L,
        optimizer=WITHIN,
        checkpoint_every=2,
        seed=5,
        load_balance=0.02,
        z_loss=0.01,
        log_every=2,
    )


def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(job: TrainJob, implementation: str) -> None:
    whole, parts = variant(job, "whole"), variant(job, "parts")
    uninterrupted = run(whole)
    assert train(parts, World(), ignore, stop_after(3)).steps == 3
    resumed = train(parts, World(), ignore, never)
    assert (resumed.restored_step, resumed.losses) == (3, uninterrupted.losses)
    check_same(weights(parts.output), weights(whole.output))
    across = run(variant(job, "across", optimizer=RECIPE))
    assert across.losses != uninterrupted.losses
    assert implementation in {MASKED, BY_DOCUMENT}


def test_both_implementations_train_alike(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    masked = run(variant(job, "masked"))
    monkeypatch.setattr(attention, "varlen_attn", by_document)
    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    kernel = variant(job, "kernel")
    assert run(kernel).losses == pytest.approx(masked.losses, rel=1e-5)
    assert "moedisco" not in (kernel.output / "config.json").read_text()  # transformers opens the model as any other
