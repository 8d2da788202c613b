"""Kernels that a layer adds to a training step, and the values of tensors for which the step waits."""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_steps import experts_of_gpus
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from moedisco_ray.core.config import FAMILIES, Architecture, FamilyName, Optimizer
from moedisco_ray.core.families import DECLARATIONS, PAGES
from moedisco_ray.models import hf_config
from moedisco_ray.training import TrainJob, World
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.sharding import configured
from moedisco_ray.training.stepper import Stepper

aten = torch.ops.aten
SEQUENCE, SEQUENCES, VOCABULARY = 16, 4, 128
LAYER = {
    "mixtral": (298, 415, 36),
    "qwen2_moe": (407, 524, 36),
    "qwen3_moe": (392, 515, 36),
    "olmoe": (392, 515, 36),
    "flex_olmo": (412, 527, 36),
    "deepseek_v2": (470, 573, 36),
    "deepseek_v3": (536, 697, 36),
    "glm4_moe": (387, 548, 36),
    "gpt_oss": (439, 575, 86),
    "dots1": (455, 616, 36),
    "solar_open": (361, 522, 36),
    "ernie4_5_moe": (373, 480, 36),
    "granitemoe": (306, 399, 36),
    "phimoe": (248, 395, 36),
    "qwen3_next": (536, 653, 36),
    "qwen3_5_moe_text": (536, 653, 36),
    "llama_moe": (298, 416, 36),
}
"""Most operations that a layer with attention may add to a step, by family: with one expert, with grouped experts as on
GPUs, and each further expert of the loop over experts that CPUs run."""
NAMED = {
    "masking_utils.py: find_packed_sequence_indices": (
        "transformers asks in each forward pass whether positions are consecutive"
    ),
    "optimizer.py: step": "the number of the step is in the machine's memory",
}
"""Places that read a tensor's value in every step, and why."""
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
READS = (
    Tensor.item,
    Tensor.tolist,
    Tensor.numpy,
    Tensor.cpu,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
)


class Step(TorchDispatchMode):
    """Counts operations on tensors but for views, and the places in code that wait for the value of a tensor.

    Attributes:
        kernels: Number of operations, by name.
        reads: Number of waits, by file and function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view:
            self.kernels[str(function)] += 1
        by_numbers = function in (aten.index.Tensor, aten._unsafe_index.Tensor) and not any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if WAITS & set(function.tags) and not by_numbers:
            self.note()
        return function(*args, **(kwargs or {}))

    def note(self) -> None:
        """Take note of the innermost function of this project, or of transformers, that waits."""
        found = [
            each
            for each in traceback.extract_stack()
            if "moedisco_ray" in each.filename or "transformers" in each.filename
        ]
        self.reads[f"{Path(found[-1].filename).name}: {found[-1].name}"] += 1


class _Methods(TorchFunctionMode):
    """Notes methods that copy a tensor to the host."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._step = step

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            self._step.note()
        return function(*args, **(kwargs or {}))


def step_of(family: FamilyName, experts: int, layers: int, **recipe: Any) -> Step:
    """The second step of a training with two micro-batches."""
    optimizer = Optimizer(batch_tokens=SEQUENCES * SEQUENCE, micro_batch=SEQUENCES // 2, **recipe)
    latent = DECLARATIONS[family].attention.latent
    sizes = Architecture(
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        moe_intermediate_size=32,
        num_experts=experts,
        num_experts_per_tok=min(2, experts),
        num_key_value_heads=None if latent else 2,
    )
    dtype = torch.bfloat16 if optimizer.state == "bf16" else torch.float32
    model = configured(
        AutoModelForCausalLM.from_config(hf_config(family, sizes, VOCABULARY, SEQUENCE, 0), dtype=dtype), optimizer
    )
    job = TrainJob(
        stage="submodels",
        name="step",
        model=Path(),
        packed_dirs=(),
        output=Path(),
        checkpoints=Path(),
        steps=2,
        sequence_length=SEQUENCE,
        optimizer=optimizer,
        checkpoint_every=None,
        load_balance=0.01 * (experts > 1),
        z_loss=0.001 * (experts > 1),
    )
    step, counted = Stepper(model, job, World()), Step()
    tokens = torch.arange(SEQUENCES * SEQUENCE).view(SEQUENCES, SEQUENCE) % VOCABULARY
    batches = [MicroBatch(part, part, job.step_tokens, None) for part in tokens.split(SEQUENCES // 2)]
    step(batches)
    with counted, _Methods(counted):
        step(batches)
    return counted


def of_a_layer(family: FamilyName, experts: int, *, grouped: bool) -> int:
    """Operations of a step with two layers, less those with one."""
    with experts_of_gpus() if grouped else nullcontext():
        one, two = (step_of(family, experts, layers, precision="bf16").kernels.total() for layers in (1, 2))
    return two - one


def test_every_family_has_its_limits() -> None:
    assert LAYER.keys() == {page.FAMILY.name for page in PAGES}


@pytest.mark.parametrize("family", LAYER)
def test_a_layer_adds_no_more_operations_than_its_limit(family: FamilyName) -> None:
    only, grouped, _ = LAYER[family]
    assert of_a_layer(family, 1, grouped=False) <= only
    assert of_a_layer(family, 4, grouped=True) <= grouped


@pytest.mark.parametrize("family", LAYER)
def test_grouped_experts_take_as_many_operations_however_many_there_are(family: FamilyName) -> None:
    assert of_a_layer(family, 16, grouped=True) == of_a_layer(family, 4, grouped=True)


@pytest.mark.parametrize("family", LAYER)
def test_each_further_expert_of_the_loop_adds_no_more_operations_than_its_limit(family: FamilyName) -> None:
    four, eight = (of_a_layer(family, experts, grouped=False) for experts in (4, 8))
    assert eight - four <= 4 * LAYER[family][2]


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_for_no_tensor_but_at_named_places(family: FamilyName, precision: str) -> None:
    with experts_of_gpus():
        assert step_of(family, 4, 1, precision=precision).reads.keys() <= NAMED.keys()
    assert step_of(family, 1, 1, precision=precision).reads.keys() <= NAMED.keys()


def test_the_loop_over_experts_is_seen_to_wait() -> None:
    assert "speed.py: sorted_experts" in step_of("qwen3_moe", 4, 1).reads
