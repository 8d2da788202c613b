"""Peak memory of sub-models of published checkpoints, at their true shapes, against the plan.

Experts take the path of GPUs. `make test-fake` runs all cases.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_steps import PUBLISHED, SEQUENCE, LiveBytes, fake_model, path_of_gpus
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils

from docs.plans import planned
from moedisco_ray.core.config import Architecture, FamilyName, Lora, Optimizer
from moedisco_ray.models.attention import BY_DOCUMENT, MASKED
from moedisco_ray.packed_tokens import batch_indices
from moedisco_ray.plan.attention_memory import needs_mask
from moedisco_ray.plan.memory import GIB, largest_block, worker_memory
from moedisco_ray.plan.parameters import count_parameters, submodel_architecture
from moedisco_ray.training import TrainJob, World
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.lora import add_adapters
from moedisco_ray.training.sharding import _configured, compute_dtype
from moedisco_ray.training.stepper import Stepper

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def _on_gpus() -> Iterator[None]:
    with path_of_gpus():
        yield


def measured(family: FamilyName, architecture: Architecture, vocabulary: int, recipe: Optimizer, lora: Lora | None = None) -> int:
    """Peak bytes of two training steps."""
    trained = torch.bfloat16 if recipe.state == "bf16" else torch.float32
    model = fake_model(family, architecture, vocabulary, trained if lora is None else compute_dtype(recipe, "cuda"))
    if recipe.within_documents:
        model.set_attn_implementation(MASKED if needs_mask(family, architecture, recipe, gpu=1) else BY_DOCUMENT)
    model = _configured(model, recipe)
    if lora is not None:
        add_adapters(model, lora, dtype=trained)
    routes = architecture.num_experts > 1
    job = TrainJob(
        stage="submodels", name="fake", model=Path(), packed_dirs=(), output=Path(), checkpoints=Path(), steps=2,
        sequence_length=SEQUENCE, optimizer=recipe, checkpoint_every=None, load_balance=0.01 * routes, z_loss=0.001 * routes)
    with FakeTensorMode(), LiveBytes() as live, warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        if recipe.within_documents:
            patch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions_BL: positions_BL)
        make_real(model)
        step = Stepper(model, job, World())
        step._checked = True        # the first step's check of the experts reads their gradients
        step.select(deep_step(family, architecture, vocabulary, recipe))
        count = recipe.batch_tokens // SEQUENCE
        size = recipe.micro_batch or count
        tokens = torch.zeros(count, SEQUENCE, dtype=torch.long)
        for _ in range(2):
            step(MicroBatch(part, part, job.step_tokens, None, part if recipe.within_documents else None)
                 for part in tokens.split(size))
    if recipe.offload_moments:      # on a CPU, the machine's memory is the device's too
        moments = (tensor for state in step.optimizer.state.values() for key, tensor in state.items() if key != "step")
        return live.peak - sum(tensor.nbytes for tensor in moments)
    return live.peak


def make_real(model: nn.Module) -> None:
    """Give a model on the meta device tensors of the device at hand; tied weights stay tied."""
    kept: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in kept:
                kept[id(parameter)] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad)
            module._parameters[name] = parameter if parameter is None else kept[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def deep_step(family: FamilyName, architecture: Architecture, vocabulary: int, recipe: Optimizer) -> int:
    """A step in which the larger one of embedding and first layer trains, if blocks do: its backward pass uses all layers."""
    blocks = architecture.num_hidden_layers + 2
    parameters = count_parameters(family, architecture, vocabulary)
    head = parameters.embedding + architecture.hidden_size      # as large as the embedding, and the last norm
    block = 0 if largest_block(parameters, architecture) == head else 1
    return next(period for period in range(blocks) if batch_indices(0, period, 1, blocks)[0] == block) * (recipe.block_steps or 1)


def check(checkpoint: str, experts: int, tokens: int, *, rank: int = 0, base: Any = "full", **recipe: Any) -> None:
    compare(
        checkpoint, with_experts(checkpoint, experts), Optimizer(batch_tokens=tokens, **recipe),
        Lora(rank=rank, base=base) if rank else None)


def with_experts(checkpoint: str, experts: int) -> Architecture:
    family, _, whole = PUBLISHED[checkpoint]
    return submodel_architecture(family, whole, whole.num_experts // experts)


def compare(checkpoint: str, sizes: Architecture, optimizer: Optimizer, lora: Lora | None = None) -> None:
    family, vocabulary, _ = PUBLISHED[checkpoint]
    plan = worker_memory(family, sizes, vocabulary, optimizer, sequence_length=SEQUENCE, gpu=1, lora=lora)
    found = measured(family, sizes, vocabulary, optimizer, lora)
    planned = plan.total - plan.overhead
    shown = {name: round(size / GIB, 2) for name, size in plan.parts.items()}
    assert planned == pytest.approx(found, rel=0.05), f"measured {found / GIB:.2f} GiB, planned {planned / GIB:.2f}: {shown}"


def test_a_submodel_of_olmoe_takes_what_the_plan_says() -> None:
    check("OLMoE-1B-7B", 1, 2 * SEQUENCE, precision="pure_bf16")


@pytest.mark.parametrize("base", ["full", "nf4"])
def test_adapters_of_a_submodel_of_olmoe_take_what_the_plan_says(base: str) -> None:
    check("OLMoE-1B-7B", 1, 2 * SEQUENCE, rank=16, base=base, precision="bf16")


@dataclasses.dataclass(frozen=True)
class Case:
    checkpoint: str
    experts: int
    sequences: int
    recipe: dict[str, Any]      # and the rank and the base of adapters


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
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, (case.checkpoint, case.experts, *case.recipe.values()))))
def test_submodels_of_every_checkpoint_take_what_the_plan_says(case: Case) -> None:
    check(case.checkpoint, case.experts, case.sequences * SEQUENCE, **case.recipe)


@pytest.mark.fake
@pytest.mark.parametrize(("checkpoint", "stage", "experts", "card"), [
    ("Mixtral-8x7B", "submodels", 1, 24), ("Qwen1.5-MoE-A2.7B", "submodels", 4, 24), ("Qwen1.5-MoE-A2.7B", "finetune", 60, 80),
    ("gpt-oss-20b", "submodels", 4, 24), ("DeepSeek-V2-Lite", "submodels", 4, 24)])
def test_chosen_settings_take_what_the_plan_says(checkpoint: str, stage: str, experts: int, card: int) -> None:
    plan = planned(checkpoint, stage)
    assert plan.choice is not None
    assert plan.fits
    assert plan.memory.total <= card * GIB
    sizes = with_experts(checkpoint, experts)
    recipe = plan.choice.optimizer
    two_micro_batches = recipe.model_copy(update={"batch_tokens": 2 * (recipe.micro_batch or 1) * SEQUENCE})
    compare(checkpoint, sizes, two_micro_batches)
