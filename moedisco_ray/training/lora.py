"""Low-rank adapters (LoRA): the matrices of the layers are frozen and compute as W + (alpha / rank) B A; only A and B are trained.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). Each expert of a stack has its own A and B.
A starts uniform within 1 / sqrt(inputs) and B at zero, as in Hugging Face PEFT, so training starts with the function of the frozen
model. As PEFT does for stacks of experts, the sum is computed when the forward pass reads the weight, and is rounded once to the
dtype of W. So the merged model computes what was trained, bit for bit.

Axes: E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from moedisco_ray.core.artifacts import write_json
from moedisco_ray.core.config import Lora
from moedisco_ray.models.shard_file import ShardFile, Stored
from moedisco_ray.training.muon import is_matrix
from moedisco_ray.training.rounding import generator

ADAPTER_FOLDER = "adapter"
"""Folder of the adapters in the directory of a trained sub-model, for `peft.PeftModel.from_pretrained` on the untrained one."""


class Adapter(nn.Module):
    """The matrices A and B of a weight, as a parametrisation of it (`torch.nn.utils.parametrize`).

    Args:
        weight: A matrix, or a stack of matrices.
        lora: Rank and scale.
        dtype: Dtype of A and B.
        source: Generator of the initial values, on the CPU.
        transposed: Whether the weight has its inputs before its outputs.
    """

    def __init__(
        self, weight: Tensor, lora: Lora, dtype: torch.dtype, source: torch.Generator, *, transposed: bool = False,
    ) -> None:
        super().__init__()
        *experts, outputs, inputs = (weight.mT if transposed else weight).shape
        bound = inputs**-0.5
        a_ERI = torch.empty(*experts, lora.rank, inputs).uniform_(-bound, bound, generator=source)
        self.a_ERI = nn.Parameter(a_ERI.to(weight.device, dtype))
        self.b_EOR = nn.Parameter(torch.zeros(*experts, outputs, lora.rank, device=weight.device, dtype=dtype))
        self._scale = lora.alpha / lora.rank
        self._transposed = transposed

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its adapter."""
        a_ERI, b_EOR = self.a_ERI.to(weight.dtype), self.b_EOR.to(weight.dtype)
        factors = (a_ERI.mT, b_EOR.mT) if self._transposed else (b_EOR, a_ERI)
        with torch.autocast(weight.device.type, enabled=False):     # it would change the dtype of an fp32 weight
            return (torch.addmm if weight.ndim == 2 else torch.baddbmm)(weight, *factors, alpha=self._scale)


def add_adapters(model: PreTrainedModel, lora: Lora, *, seed: int, dtype: torch.dtype) -> None:
    """Freeze a model, and give each matrix of its layers an adapter, whose initial values depend on the seed and its name alone."""
    model.requires_grad_(requires_grad=False)
    for name, weight in list(model.named_parameters()):
        if is_matrix(name, weight):
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            source = generator(torch.device("cpu"), f"adapter {seed} {name}", 0, 0)
            adapter = Adapter(weight, lora, dtype, source, transposed=weight.ndim > 2 and bool(module.is_transposed))
            # `unsafe` leaves out a trial run, which would compute each weight.
            parametrize.register_parametrization(module, attribute, adapter, unsafe=True)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model, by the name of the weight; empty if all weights are trained."""
    return {
        f"{path}.{attribute}": chain[0] for path, module in model.named_modules() if parametrize.is_parametrized(module)
        for attribute, chain in module.parametrizations.items()}


def saved_part(model: nn.Module) -> nn.Module:
    """The part of a model that checkpoints hold: the adapters if it has any, because all other weights stay those of the start."""
    found = adapters(model)
    return nn.ModuleDict({name.replace(".", "/"): adapter for name, adapter in found.items()}) if found else model


def merge_adapters(model: nn.Module) -> None:
    """Replace each weight that has an adapter by their sum, in place."""
    for name in adapters(model):
        path, _, attribute = name.rpartition(".")
        parametrize.remove_parametrizations(model.get_submodule(path), attribute, leave_parametrized=True)


def save_adapters(model: nn.Module, lora: Lora, directory: Path) -> list[Path]:
    """Write a model's adapters in the format of PEFT; returns the files.

    Raises:
        OSError: The disk is full or broken.
    """
    tensors: dict[str, Tensor] = {}
    found = adapters(model)
    for name, adapter in found.items():
        path, _, attribute = name.rpartition(".")
        # PEFT wraps a module once for each of its stacks of experts; the first wrapper is inside the second.
        wrapper = f"base_model.model.{path}{'.base_layer' if attribute == 'gate_up_proj' else ''}"
        a_ERI, b_EOR = adapter.a_ERI.detach(), adapter.b_EOR.detach()
        tensors[f"{wrapper}.lora_A.weight"] = a_ERI.flatten(0, -2).contiguous()
        tensors[f"{wrapper}.lora_B.weight"] = (b_EOR if b_EOR.ndim == 2 else b_EOR.permute(1, 2, 0)).flatten(1).contiguous()
    # PEFT takes names of projections outside the attention for those of experts, unless they are names of parameters.
    attention = {name: ".self_attn." in name for name in found}
    directory.mkdir(parents=True)
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": lora.rank, "lora_alpha": lora.alpha,
        "target_modules": [name.removesuffix(".weight") for name in found if attention[name]],
        "target_parameters": [name for name in found if not attention[name]]})
    layout = {key: Stored(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    with ShardFile(directory / "adapter_model.safetensors", layout) as file:
        for key, tensor in tensors.items():
            file.put(key, tensor)
        file.complete()
    return sorted(directory.iterdir())
