"""Peak memory of sub-models of published checkpoints, at their true shapes, against the plan.

Experts take the path of GPUs. `make test-fake` runs all cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from fake_steps import PUBLISHED, SEQUENCE, measured, path_of_gpus

from docs.plans import planned
from moedisco_ray.core.config import Architecture, Lora, Optimizer
from moedisco_ray.plan.memory import GIB, worker_memory
from moedisco_ray.plan.parameters import submodel_architecture

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def _on_gpus() -> Iterator[None]:
    with path_of_gpus():
        yield


def check(checkpoint: str, experts: int, tokens: int, *, rank: int = 0, base: Any = "full", **recipe: Any) -> None:
    compare(
        checkpoint,
        with_experts(checkpoint, experts),
        Optimizer(batch_tokens=tokens, **recipe),
        Lora(rank=rank, base=base) if rank else None,
    )


def with_experts(checkpoint: str, experts: int) -> Architecture:
    family, _, whole = PUBLISHED[checkpoint]
    return submodel_architecture(family, whole, whole.num_experts // experts)


def compare(checkpoint: str, sizes: Architecture, optimizer: Optimizer, lora: Lora | None = None) -> None:
    family, vocabulary, _ = PUBLISHED[checkpoint]
    plan = worker_memory(family, sizes, vocabulary, optimizer, sequence_length=SEQUENCE, gpu=1, lora=lora)
    found = max(measured(family, sizes, vocabulary, optimizer, lora).values())
    planned = plan.total - plan.overhead
    shown = {name: round(size / GIB, 2) for name, size in plan.parts.items()}
    assert planned == pytest.approx(found, rel=0.05), (
        f"measured {found / GIB:.2f} GiB, planned {planned / GIB:.2f}: {shown}"
    )


@pytest.mark.slow
def test_a_submodel_of_olmoe_takes_what_the_plan_says() -> None:
    check("OLMoE-1B-7B", 1, 2 * SEQUENCE, precision="pure_bf16")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["full", "nf4"])
def test_adapters_of_a_submodel_of_olmoe_take_what_the_plan_says(base: str) -> None:
    check("OLMoE-1B-7B", 1, 2 * SEQUENCE, rank=16, base=base, precision="bf16")


@dataclasses.dataclass(frozen=True)
class Case:
    checkpoint: str
    experts: int
    sequences: int
    recipe: dict[str, Any]  # and the rank and the base of adapters


CASES = [
    Case("OLMoE-1B-7B", 4, 2, {"precision": "pure_bf16"}),
    Case("OLMoE-1B-7B", 4, 3, {"precision": "pure_bf16", "micro_batch": 1}),
    Case("OLMoE-1B-7B", 4, 2, {"precision": "pure_bf16", "gradient_checkpointing": True}),
    Case("OLMoE-1B-7B", 4, 2, {"precision": "pure_bf16", "name": "muon"}),
    Case("OLMoE-1B-7B", 1, 2, {"precision": "fp32"}),
    Case("OLMoE-1B-7B", 4, 2, {"precision": "bf16"}),
    Case("Qwen1.5-MoE-A2.7B", 4, 2, {"precision": "pure_bf16"}),
    Case("Qwen3-30B-A3B", 4, 1, {"precision": "pure_bf16"}),
    Case("Qwen3-30B-A3B", 4, 2, {"precision": "pure_bf16", "micro_batch": 1, "gradient_checkpointing": True}),
    Case("Mixtral-8x7B", 1, 2, {"precision": "pure_bf16"}),
    Case("OLMoE-1B-7B", 4, 2, {"precision": "pure_bf16", "moments": "fp8"}),
    Case("OLMoE-1B-7B", 4, 1, {"precision": "bf16", "moments": "fp8"}),
    Case("OLMoE-1B-7B", 4, 2, {"precision": "pure_bf16", "offload_moments": True}),
    Case("OLMoE-1B-7B", 4, 3, {"precision": "pure_bf16", "block_steps": 100, "micro_batch": 1}),
    Case("OLMoE-1B-7B", 1, 2, {"precision": "pure_bf16", "block_steps": 100}),
    Case("Mixtral-8x7B", 1, 2, {"precision": "pure_bf16", "block_steps": 100, "micro_batch": 1}),
    Case("gpt-oss-20b", 4, 2, {"precision": "pure_bf16", "micro_batch": 1}),
    Case("DeepSeek-V2-Lite", 4, 2, {"precision": "pure_bf16"}),
    Case("DeepSeek-V2-Lite", 4, 1, {"precision": "bf16"}),
    Case("GLM-4.5-Air", 4, 1, {"precision": "pure_bf16"}),
    Case("DeepSeek-V3", 4, 1, {"precision": "pure_bf16"}),
    Case("FlexOlmo-7x7B-1T", 1, 1, {"precision": "pure_bf16"}),
    Case("FlexOlmo-7x7B-1T", 7, 1, {"precision": "pure_bf16", "gradient_checkpointing": True}),
    Case("dots.llm1", 4, 1, {"precision": "pure_bf16"}),
    Case("Solar-Open-100B", 4, 1, {"precision": "pure_bf16"}),
    Case("ERNIE-4.5-21B-A3B", 4, 2, {"precision": "pure_bf16"}),
    Case("ERNIE-4.5-21B-A3B", 4, 1, {"precision": "bf16"}),
    Case("Granite-3.0-3B-A800M", 4, 2, {"precision": "pure_bf16"}),
    Case("Granite-3.0-3B-A800M", 4, 2, {"precision": "bf16", "micro_batch": 1}),
    Case("Phi-3.5-MoE", 1, 2, {"precision": "pure_bf16"}),
    Case("Phi-3.5-MoE", 2, 2, {"precision": "pure_bf16", "micro_batch": 1}),
    Case("Phi-3.5-MoE", 2, 2, {"precision": "bf16", "gradient_checkpointing": True}),
    Case("Qwen3.5-35B-A3B", 4, 1, {"precision": "pure_bf16"}),
    Case("Qwen3.5-35B-A3B", 4, 1, {"precision": "bf16"}),
    Case("Qwen3.5-35B-A3B", 4, 2, {"precision": "pure_bf16", "micro_batch": 1, "gradient_checkpointing": True}),
    Case("Qwen3.5-35B-A3B", 1, 2, {"precision": "pure_bf16", "block_steps": 100, "micro_batch": 1}),
    Case("Qwen3.5-35B-A3B", 4, 1, {"precision": "pure_bf16", "rank": 16}),
    Case("Qwen3-Next-80B-A3B", 4, 1, {"precision": "pure_bf16"}),
    Case("LLaMA-MoE-v1-3.5B-4/16", 4, 1, {"precision": "pure_bf16"}),
    Case("OLMoE-1B-7B", 4, 2, {"precision": "pure_bf16", "gradient_checkpointing": True, "rank": 16}),
    Case("OLMoE-1B-7B", 4, 3, {"precision": "pure_bf16", "micro_batch": 1, "rank": 64}),
    Case("Mixtral-8x7B", 1, 2, {"precision": "pure_bf16", "gradient_checkpointing": True, "rank": 16}),
    Case("gpt-oss-20b", 4, 2, {"precision": "pure_bf16", "micro_batch": 1, "gradient_checkpointing": True, "rank": 8}),
    Case("DeepSeek-V2-Lite", 4, 2, {"precision": "pure_bf16", "rank": 24}),
    Case("OLMoE-1B-7B", 4, 2, {"precision": "pure_bf16", "rank": 16, "base": "nf4"}),
    Case("Mixtral-8x7B", 1, 1, {"precision": "bf16", "rank": 16, "base": "nf4"}),
    Case("Mixtral-8x7B", 1, 2, {"precision": "pure_bf16", "gradient_checkpointing": True, "rank": 16, "base": "nf4"}),
    Case("gpt-oss-20b", 4, 2, {"precision": "pure_bf16", "micro_batch": 1, "rank": 8, "base": "nf4"}),
    Case("DeepSeek-V2-Lite", 4, 2, {"precision": "bf16", "rank": 24, "base": "nf4"}),
    Case("Qwen3.5-35B-A3B", 4, 1, {"precision": "pure_bf16", "rank": 16, "base": "nf4"}),
    Case("Qwen3-30B-A3B", 4, 8, {"precision": "pure_bf16", "within_documents": True}),
    Case("Qwen3-30B-A3B", 1, 8, {"precision": "fp32", "within_documents": True}),
    Case("Qwen3-30B-A3B", 1, 16, {"precision": "fp32", "within_documents": True, "gradient_checkpointing": True}),
    Case("DeepSeek-V2-Lite", 4, 8, {"precision": "pure_bf16", "within_documents": True}),
]


@pytest.mark.fake
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: "-".join(map(str, (case.checkpoint, case.experts, *case.recipe.values())))
)
def test_submodels_of_every_checkpoint_take_what_the_plan_says(case: Case) -> None:
    check(case.checkpoint, case.experts, case.sequences * SEQUENCE, **case.recipe)


@pytest.mark.fake
@pytest.mark.parametrize(
    ("checkpoint", "stage", "experts", "card"),
    [
        ("Mixtral-8x7B", "submodels", 1, 24),
        ("Qwen1.5-MoE-A2.7B", "submodels", 4, 24),
        ("Qwen1.5-MoE-A2.7B", "finetune", 60, 80),
        ("gpt-oss-20b", "submodels", 4, 24),
        ("DeepSeek-V2-Lite", "submodels", 4, 24),
    ],
)
def test_chosen_settings_take_what_the_plan_says(checkpoint: str, stage: str, experts: int, card: int) -> None:
    plan = planned(checkpoint, stage)
    assert plan.choice is not None
    assert plan.fits
    assert plan.memory.total <= card * GIB
    sizes = with_experts(checkpoint, experts)
    recipe = plan.choice.optimizer
    two_micro_batches = recipe.model_copy(update={"batch_tokens": 2 * (recipe.micro_batch or 1) * SEQUENCE})
    compare(checkpoint, sizes, two_micro_batches)
