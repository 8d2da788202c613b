"""The trials of a device on the CPU: each finds what is wrong with it, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.config import Architecture, Optimizer
from moedisco_ray.core.records.measurements import MemoryTrial
from moedisco_ray.execution.doctor.slot import memory_check, resume_check
from moedisco_ray.plan.memory import worker_memory
from moedisco_ray.training import moments
from moedisco_ray.training.examination import kernels as kernels_module
from moedisco_ray.training.examination.exchanges import groups
from moedisco_ray.training.examination.kernels import Kernels, try_kernels
from moedisco_ray.training.examination.resume import Resumed, try_resuming
from moedisco_ray.training.examination.trial import Trial, largest_power, out_of_memory, try_memory, try_speed

SIZES = Architecture(
    hidden_size=64, num_attention_heads=4, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
)
RECIPE = Optimizer(batch_tokens=128, micro_batch=2)


def outcomes(family: str = "qwen3_moe", precision: str = "pure_bf16") -> dict[str, bool]:
    torch.set_num_threads(1)
    kernels = Kernels(family, SIZES, Optimizer(precision=precision))  # type: ignore[arg-type]  # a literal
    return {each.name: each.passed for each in try_kernels(kernels, "cpu")}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_every_kernel_of_a_healthy_device_passes(precision: str) -> None:
    found = outcomes(precision=precision)
    assert len(found) == 6
    assert all(found.values())


def test_a_family_whose_layers_carry_a_state_has_no_packed_documents() -> None:
    torch.set_num_threads(1)
    [layer] = [each for each in try_kernels(Kernels("qwen3_next", SIZES, RECIPE), "cpu") if "documents" in each.name]
    assert (layer.impossible, layer.error) == (True, None)


def test_a_wrong_grouped_product_fails_and_so_does_what_it_is_part_of(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = kernels_module.grouped_experts
    monkeypatch.setattr(kernels_module, "grouped_experts", lambda *given: 1.03 * compute(*given))
    assert [name for name, passed in outcomes().items() if not passed] == [
        "grouped product of experts",
        "exchange of divided experts",
    ]


def test_moments_that_are_rounded_too_coarsely_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_DROPPED_BITS", 21)
    assert [name for name, passed in outcomes().items() if not passed] == ["moments in 8 bits"]


def test_a_kernel_that_a_device_refuses_fails_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given):
        raise RuntimeError("strides should be multiple of 16 bytes\nmore")

    monkeypatch.setattr(kernels_module, "summed_cross_entropy", refuse)
    [loss] = [each for each in try_kernels(Kernels("mixtral", SIZES, RECIPE), "cpu") if each.name == "loss in tiles"]
    assert (loss.passed, loss.reason) == (False, "strides should be multiple of 16 bytes")


def trial() -> Trial:
    planned = worker_memory("mixtral", SIZES, 256, RECIPE, sequence_length=16, gpu=0)
    return Trial("submodels", "mixtral", SIZES, 256, 16, RECIPE, planned, routes=True)


def test_a_training_is_tried_with_its_settings() -> None:
    torch.set_num_threads(1)
    found = try_memory(trial(), "cpu", seconds=60.0)
    assert (found.micro_batch, found.largest_micro_batch) == (2, 8)
    assert found.planned_bytes == trial().planned.total - trial().planned.overhead
    assert 0 <= found.peak_bytes < 2**30
    speed = try_speed(trial(), "cpu", seconds=0.0)
    assert speed.experts == 4
    assert speed.flops_per_second > 6 * speed.tokens_per_second
    assert speed.mfu is None


def test_no_larger_micro_batch_is_tried_after_its_time() -> None:
    assert try_memory(trial(), "cpu", seconds=0.0).largest_micro_batch is None


@given(limit=st.integers(0, 5000), most=st.integers(1, 5000))
def test_doubling_finds_the_largest_power_of_two_that_fits(limit: int, most: int) -> None:
    found = largest_power(lambda size: size <= limit, most)
    fitting = [2**n for n in range(14) if 2**n <= min(limit, most)]
    assert found == (fitting[-1] if fitting else None)


def test_only_errors_about_memory_become_one() -> None:
    with pytest.raises(MemoryError, match="CUDA out of memory"), out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    with pytest.raises(RuntimeError, match="shape"), out_of_memory():
        raise RuntimeError("shape")


@pytest.mark.parametrize(
    ("peak", "gpu", "state", "says"),
    [
        (109, True, "ok", ""),
        (91, True, "ok", ""),
        (125, True, "failed", "set pools.low_memory.memory_gb to 0.80 of its value"),
        (80, True, "warning", "larger"),
        (125, False, "ok", ""),
    ],
)
def test_a_cards_peak_must_be_within_a_tenth_of_the_plan(peak: int, gpu: bool, state: str, says: str) -> None:
    found = MemoryTrial(stage="submodels", planned_bytes=100 << 20, peak_bytes=peak << 20, micro_batch=1)
    check = memory_check(found, "pools.low_memory", gpu=gpu)
    assert check.state == state
    assert says in (check.remedy or "")


def test_a_resumed_training_on_the_cpu_is_the_same(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert try_resuming("qwen3_moe", Optimizer(moments="fp8", precision="pure_bf16"), "cpu", tmp_path) == Resumed(
        4, same=True, difference=0.0
    )


@pytest.mark.parametrize(
    ("found", "gpu", "state"),
    [
        (Resumed(4, same=True, difference=0.0), False, "ok"),
        (Resumed(4, same=False, difference=1e-4), True, "ok"),
        (Resumed(4, same=False, difference=1e-4), False, "failed"),
        (Resumed(4, same=False, difference=0.1), True, "failed"),
        (Resumed(0, same=True, difference=0.0), True, "failed"),
    ],
)
def test_only_a_gpu_may_resume_with_other_rounding(found: Resumed, gpu: bool, state: str) -> None:
    assert resume_check(found, gpu=gpu).state == state


def test_exchanges_are_within_each_node_and_between_one_worker_of_every_node() -> None:
    assert groups(("a", "b", "a", "c", "b")) == [("within", [0, 2]), ("within", [1, 4]), ("between", [0, 1, 3])]
    assert groups(("a", "a")) == [("within", [0, 1])]
    assert groups(("a",)) == []
