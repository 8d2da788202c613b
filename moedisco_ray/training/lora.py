"""Low-rank adapters (LoRA): frozen matrices of the layers compute as W + (alpha / rank) B A; only A and B train.

Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). Each expert of a stack has its
own A and B. A starts uniform within 1 / sqrt(inputs) and B at zero, as in Hugging Face PEFT, so training starts with
the function of the frozen model. As PEFT does for stacks of experts, the sum is computed when the forward pass reads
the weight, and is rounded once to the dtype of W. So the merged model computes what was trained, bit for bit.

With `base: nf4` (QLoRA), W is kept in 4 bits (`training.nf4`), and sums are made of the rounded W. The merged model has
the W of the start instead, as has the stored adapter in PEFT. A run of a tiny MoE ended at a held-out loss of 4.4200
with it, at 4.4226 with adapters merged into the rounded W, and at 4.4185 with `base: full`.

A sum is not kept from the forward to the backward pass, which computes it again (`SumsAgain`).

Axes: E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from moedisco_ray.core.config import Lora
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.models import stored_tensors
from moedisco_ray.models.shard_file import ShardFile, Stored
from moedisco_ray.training.muon import is_matrix
from moedisco_ray.training.nf4 import Nf4
from moedisco_ray.training.rounding import generator

Read = Callable[[Mapping[str, Tensor]], None]
"""Fills tensors, by their names in a transformers model, from the files of a model."""


class Adapter(nn.Module):
    """The matrices A and B of a weight, as its parametrisation (`torch.nn.utils.parametrize`); at first without values.

    Args:
        weight: A matrix, or a stack of matrices.
        lora: Rank and scale, and how the frozen weight is kept.
        dtype: Dtype of A and B.
        transposed: Whether the weight has its inputs before its outputs.

    Attributes:
        base: The frozen weight in 4 bits; None: the parametrised tensor is the weight.
    """

    def __init__(self, weight: Tensor, lora: Lora, dtype: torch.dtype, *, transposed: bool = False) -> None:
        super().__init__()
        *experts, outputs, inputs = (weight.mT if transposed else weight).shape
        self.a_ERI = nn.Parameter(weight.new_empty(*experts, lora.rank, inputs, dtype=dtype))
        self.b_EOR = nn.Parameter(weight.new_empty(*experts, outputs, lora.rank, dtype=dtype))
        self.base = Nf4(weight) if lora.base == "nf4" else None
        self._scale = lora.alpha / lora.rank
        self._transposed = transposed

    @torch.no_grad()
    def start(self, source: torch.Generator) -> None:
        """Give A and B their initial values; the generator is on the CPU."""
        bound = self.a_ERI.shape[-1] ** -0.5
        self.a_ERI.copy_(torch.empty(self.a_ERI.shape).uniform_(-bound, bound, generator=source))
        self.b_EOR.zero_()

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its adapter; a weight in 4 bits is read from `base`."""
        return self.added_to(weight) if self.base is None else self.added_to(self.base.dense(), in_place=True)

    def added_to(self, weight: Tensor, *, in_place: bool = False) -> Tensor:
        a_ERI, b_EOR = self.a_ERI.to(weight.dtype), self.b_EOR.to(weight.dtype)
        factors = (a_ERI.mT, b_EOR.mT) if self._transposed else (b_EOR, a_ERI)
        add = ("addmm" if weight.ndim == 2 else "baddbmm") + "_" * in_place
        with torch.autocast(weight.device.type, enabled=False):  # it would change the dtype of an fp32 weight
            found: Tensor = getattr(weight, add)(*factors, alpha=self._scale)
        return found


def add_adapters(model: PreTrainedModel, lora: Lora, *, dtype: torch.dtype) -> None:
    """Freeze a model, and give each matrix of its layers an adapter without values; see `start_adapters`.

    With `base: nf4`, the matrices themselves are taken away. The model may be on the meta device, so that they never
    take memory.
    """
    model.requires_grad_(requires_grad=False)
    for name, weight in list(model.named_parameters()):
        if is_matrix(name, weight):
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            adapter = Adapter(weight, lora, dtype, transposed=weight.ndim > 2 and bool(module.is_transposed))
            if adapter.base is not None:
                setattr(module, attribute, nn.Parameter(weight.new_empty(0), requires_grad=False))
            # `unsafe` leaves out a trial run, which would compute each weight.
            parametrize.register_parametrization(module, attribute, adapter, unsafe=True)


def start_adapters(model: nn.Module, read: Read, *, seed: int) -> None:
    """Give adapters initial values, which depend only on seed and weight's name, and read weights in 4 bits."""
    for name, adapter in adapters(model).items():
        adapter.start(generator(torch.device("cpu"), f"adapter {seed} {name}", 0, 0))
        if adapter.base is not None:
            adapter.base.store(_read_weight(name, adapter.base, read))


def _read_weight(name: str, base: Nf4, read: Read) -> Tensor:
    weight = torch.empty(base.shape, dtype=base.dtype, device=base.codes_P.device)
    read({name: weight})
    return weight


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model, by the name of the weight; empty if all weights are trained."""
    return {name: chain[0] for name, chain in _chains(model)}


def _chains(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The lists of parametrisations of a model, with the name of the weight."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for attribute, chain in module.parametrizations.items():
                yield f"{path}.{attribute}", chain


def unadapted_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model's files, by name, without adapters and without weights in 4 bits."""
    found = {name: each for name, each in stored_tensors(model).items() if ".parametrizations." not in name}
    return found | {name: chain.original for name, chain in _chains(model) if chain[0].base is None}


def saved_part(model: nn.Module) -> nn.Module:
    """The part of a model that checkpoints hold: its adapters, if any, since other weights stay those of the start."""
    found = adapters(model)
    return nn.ModuleDict({name.replace(".", "/"): adapter for name, adapter in found.items()}) if found else model


def merged_tensors(model: PreTrainedModel, read: Read) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """The tensors of a model whose weights are in 4 bits, with its adapters merged into the weights of the start.

    Returns:
        Tensors of the right shapes and dtypes by name, and a function that makes the tensor of a name: one at a time,
        because all together may need more memory than the device has.
    """
    plain = unadapted_tensors(model)
    packed = {name: (adapter, adapter.base) for name, adapter in adapters(model).items() if adapter.base is not None}
    shapes = {name: torch.empty(base.shape, dtype=base.dtype, device="meta") for name, (_, base) in packed.items()}

    @torch.no_grad()
    def value(name: str) -> Tensor:
        if name in plain:
            return plain[name]
        adapter, base = packed[name]
        return adapter.added_to(_read_weight(name, base, read), in_place=True)

    return plain | shapes, value


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
        tensors[f"{wrapper}.lora_B.weight"] = (
            (b_EOR if b_EOR.ndim == 2 else b_EOR.permute(1, 2, 0)).flatten(1).contiguous()
        )
    # PEFT takes names of projections outside the attention for those of experts, unless they are names of parameters.
    attention = {name: ".self_attn." in name for name in found}
    directory.mkdir(parents=True)
    write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "target_modules": [name.removesuffix(".weight") for name in found if attention[name]],
            "target_parameters": [name for name in found if not attention[name]],
        },
    )
    layout = {key: Stored(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    with ShardFile(directory / "adapter_model.safetensors", layout) as file:
        for key, tensor in tensors.items():
            file.put(key, tensor)
        file.complete()
    return sorted(directory.iterdir())


class SumsAgain:
    """Computes the sums of weights and adapters again in the backward pass, so that autograd keeps none of them.

    Each product in which a weight takes part keeps it for the gradient of its input. Within `saving`, it keeps instead
    which weight it was. Layers that are computed again as a whole (gradient checkpointing) keep their sums meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        # A sum is recognised by its storage, which views of it share.
        self._readings: weakref.WeakKeyDictionary[torch.UntypedStorage, _Reading] = weakref.WeakKeyDictionary()
        self._adapters = adapters(model)
        for adapter in self._adapters.values():
            adapter.register_forward_hook(self._note)

    def saving(self) -> contextlib.AbstractContextManager[Any]:
        """Context for forward passes."""
        return (
            torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
            if self._adapters
            else contextlib.nullcontext()
        )

    def _note(self, adapter: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self._readings[output.untyped_storage()] = _Reading(adapter, *inputs)

    def _pack(self, tensor: Tensor) -> Tensor | tuple[_Reading, Any]:
        reading = self._readings.get(tensor.untyped_storage())
        if reading is None:
            return tensor
        reading.uses += 1
        return reading, (tensor.shape, tensor.stride(), tensor.storage_offset())


class _Reading:
    """A weight with its adapter, as one forward pass has read it.

    Attributes:
        uses: Number of saved tensors that are views of the sum and that the backward pass has not asked for yet.
    """

    def __init__(self, adapter: nn.Module, weight: Tensor) -> None:
        self._adapter, self._weight = adapter, weight
        self._sum: Tensor | None = None
        self.uses = 0

    def view(self, shape: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        """A view of the sum, which stays until each of its views was asked for once."""
        found = self._adapter.forward(self._weight) if self._sum is None else self._sum
        self.uses -= 1
        self._sum = found if self.uses > 0 else None
        return torch.as_strided(found, shape, stride, offset)


def _unpack(saved: Tensor | tuple[_Reading, Any]) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    reading, view = saved
    return reading.view(*view)
