"""Kernels that a layer adds to a training step, and the values of tensors for which the step waits."""

from __future__ import annotations

import functools
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_steps import experts_of_gpus
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from moedisco_ray.core.config import FAMILIES, Architecture, FamilyName, Optimizer
from moedisco_ray.core.families import DECLARATIONS, PAGES
from moedisco_ray.models import grouped, hf_config
from moedisco_ray.models.expert_parallel import divided_experts
from moedisco_ray.models.speed import grouped_experts
from moedisco_ray.training import TrainJob, World
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.sharding import configured
from moedisco_ray.training.stepper import ResidentStepper

aten = torch.ops.aten
SEQUENCE, SEQUENCES, MICRO_BATCHES, VOCABULARY = 16, 4, 2, 128
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
MOST = (540, 700, 36)
"""Those of every other family of this package."""
OURS = [page.FAMILY.name for page in PAGES]
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


def model_of(family: FamilyName, experts: int, layers: int, optimizer: Optimizer) -> PreTrainedModel:
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
    config = hf_config(family, sizes, VOCABULARY, SEQUENCE, 0)
    return configured(AutoModelForCausalLM.from_config(config, dtype=dtype), optimizer)


def step_of(family: FamilyName, experts: int, layers: int, **recipe: Any) -> Step:
    """The second step of a training with two micro-batches."""
    optimizer = Optimizer(batch_tokens=SEQUENCES * SEQUENCE, micro_batch=SEQUENCES // MICRO_BATCHES, **recipe)
    model = model_of(family, experts, layers, optimizer)
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
    step, counted = ResidentStepper(model, job, World()), Step()
    tokens = torch.arange(SEQUENCES * SEQUENCE).view(SEQUENCES, SEQUENCE) % VOCABULARY
    batches = [MicroBatch(part, part, job.step_tokens, None) for part in tokens.split(SEQUENCES // MICRO_BATCHES)]
    step(batches)
    with counted, _Methods(counted):
        step(batches)
    return counted


@functools.cache
def of_a_layer(family: FamilyName, experts: int, *, grouped: bool) -> int:
    """Operations of a step with two layers, less those with one."""
    with experts_of_gpus() if grouped else nullcontext():
        one, two = (step_of(family, experts, layers, precision="bf16").kernels.total() for layers in (1, 2))
    return two - one


@pytest.mark.parametrize("family", OURS)
def test_a_layer_adds_no_more_operations_than_its_limit(family: FamilyName) -> None:
    only, grouped, _ = LAYER.get(family, MOST)
    assert of_a_layer(family, 1, grouped=False) <= only
    assert of_a_layer(family, 4, grouped=True) <= grouped


@pytest.mark.parametrize("family", OURS)
def test_grouped_experts_take_as_many_operations_however_many_there_are(family: FamilyName) -> None:
    assert of_a_layer(family, 16, grouped=True) == of_a_layer(family, 4, grouped=True)


@pytest.mark.parametrize("family", OURS)
def test_each_further_expert_of_the_loop_adds_no_more_operations_than_its_limit(family: FamilyName) -> None:
    four, eight = (of_a_layer(family, experts, grouped=False) for experts in (4, 8))
    assert eight - four <= 4 * LAYER.get(family, MOST)[2]


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_waits_for_no_tensor_but_at_named_places(family: FamilyName, precision: str) -> None:
    with experts_of_gpus():
        assert step_of(family, 4, 1, precision=precision).reads.keys() <= NAMED.keys()
    assert step_of(family, 1, 1, precision=precision).reads.keys() <= NAMED.keys()


def test_the_loop_over_experts_is_seen_to_wait() -> None:
    assert "grouped.py: counts" in step_of("qwen3_moe", 4, 1).reads


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_layer_waits_once_per_pass_where_torch_has_no_kernel_for_grouped_products(
    monkeypatch: pytest.MonkeyPatch, family: FamilyName
) -> None:
    """Before: each of the products waited, 6 per layer and micro-batch, or 8 if activations are recomputed."""
    monkeypatch.setattr(grouped, "has_kernel", lambda _: False)
    with experts_of_gpus():
        one, two = (step_of(family, 4, layers, precision="bf16") for layers in (1, 2))
    assert two.reads - one.reads == {"grouped.py: counts": MICRO_BATCHES}
    assert not [name for name in two.kernels if "grouped_mm" in name]


def test_a_layer_has_six_grouped_products_each_of_which_may_wait() -> None:
    with experts_of_gpus():
        one, two = (step_of("qwen3_moe", 4, layers, precision="bf16").kernels for layers in (1, 2))
    assert (two - one)["aten._grouped_mm.default"] == 6 * MICRO_BATCHES


def test_divided_experts_wait_once_in_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before: four waits, two of them in `bincount`, and those of the products."""
    monkeypatch.setattr(grouped, "has_kernel", lambda _: False)
    experts = model_of("qwen3_moe", 4, 1, Optimizer()).model.layers[0].mlp.experts
    x_TD, weight_TK = torch.randn(10, 64, requires_grad=True), torch.rand(10, 2)
    expert_TK, counted = torch.rand(10, 4).topk(2).indices, Step()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        with counted, _Methods(counted):
            found = divided_experts(
                experts, x_TD, expert_TK, weight_TK, group=dist.group.WORLD, compute=grouped_experts
            )
            torch.autograd.backward(found.sum())
    finally:
        dist.destroy_process_group()
    assert counted.reads == {"expert_parallel.py: divided_experts": 1}
