"""Tensors of a model under the names and in the layout of llama.cpp.

The names come from the tables of the `gguf` package. All experts of a layer are one tensor per projection.

Shapes: E experts, H heads, C dimensions of a head, D hidden size, F hidden size of an expert, R rank of the latent
attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import torch
from torch import Tensor

from moedisco_ray.contrib.gguf.reading import frequency_divisors
from moedisco_ray.contrib.gguf.recurrence import recurrent_parts
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import PARTS, Family, Part
from moedisco_ray.models import Checkpoint, Role

_KINDS = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}

_IN_FP32 = ("_norm.", "ffn_gate_inp", "ssm_conv1d")
"""Parts of the names of matrices that llama.cpp reads only in fp32."""


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: Name in the file.
        shape: Shape as torch has it; a GGUF file lists it in reverse.
        dtype: Dtype in the file.
        read: Reads the values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def kind(self) -> gguf.GGMLQuantizationType:
        """Dtype as the file names it."""
        return _KINDS[self.dtype]


def gguf_tensors(weights: Checkpoint) -> list[GgufTensor]:
    """All tensors of a model, in the order of the layers. None is read before `GgufTensor.read`.

    llama.cpp computes with norms, biases and routers in fp32, so these are stored in fp32.

    Raises:
        CheckpointError: llama.cpp has no place for a tensor, or dense layers follow an MoE layer.
    """
    family = weights.model_map.family
    dense, layers = family.dense_layers(weights.config), int(weights.config["num_hidden_layers"])
    if list(weights.model_map.experts(weights)) != list(range(dense, layers)):
        raise CheckpointError(
            "checkpoint",
            str(weights.directory),
            "has a dense layer after an MoE layer, which llama.cpp does not run; use `--to hf`",
        )
    found = [each for key in weights for each in _converted(weights, key)]
    if weights.config.get("tie_word_embeddings") and family.gguf is not None and not family.gguf.reads_tied:
        found.append(dataclasses.replace(found[0], name="output.weight"))
    names = gguf.get_tensor_name_map(_architecture(family), layers)
    named = [_named(tensor, names) for tensor in found]
    divisors = frequency_divisors(weights.config)
    if divisors is not None:
        named.append(GgufTensor("rope_freqs.weight", tuple(divisors.shape), torch.float32, lambda: divisors))
    return named


def _architecture(family: Family) -> gguf.MODEL_ARCH:
    name = None if family.gguf is None else family.gguf.architecture
    return next(each for each, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _named(tensor: GgufTensor, names: gguf.TensorNameMap) -> GgufTensor:
    name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise CheckpointError("tensor", tensor.name, "has no place in a GGUF file of this family; use `--to hf`")
    in_fp32 = len(tensor.shape) == 1 or not name.endswith(".weight") or any(part in name for part in _IN_FP32)
    return dataclasses.replace(tensor, name=name, dtype=torch.float32 if in_fp32 else tensor.dtype)


def _converted(weights: Checkpoint, key: str) -> Iterator[GgufTensor]:
    """The tensors of a file that a canonical tensor begins; the other experts of a layer follow the first."""
    role, family, config = weights.model_map.classify(key), weights.model_map.family, weights.config
    name = key.replace("_correction_bias", "_correction.bias").replace("sinks", "sinks.weight")
    if role.role is Role.EXPERT and role.layer is not None:
        if family.stacks:
            yield from _of_stack(weights, key) if family.interleaved else _of_halves(weights, key, role.layer)
        elif role.expert == 0:
            yield _stacked(weights, role.layer, next(part for part in PARTS if part == role.part))
    elif family.attention.latent and "kv_b_proj" in key:
        yield from _latent_projections(weights, key)
    elif family.gguf is not None and family.gguf.in_pairs and ("q_proj" in key or "k_proj" in key):
        heads = int(config["num_attention_heads" if "q_proj" in key else "num_key_value_heads"])
        yield _changed(weights, key, name, lambda tensor: _in_pairs(tensor, heads))
    elif "linear_attn." in key:
        for part, change in recurrent_parts(key, family, config):
            yield _changed(weights, key, part, change)
    elif family.adds_one(key):
        yield _changed(weights, key, name, lambda tensor: 1 + tensor.float())
    elif "shared_expert_gate" in key or role.expert_axis:  # tensors [1, n] that llama.cpp has as [n]
        yield _changed(weights, key, name, lambda tensor: tensor[0])
    else:
        yield _changed(weights, key, name, lambda tensor: tensor)


def _changed(weights: Checkpoint, key: str, name: str, change: Callable[[Tensor], Tensor]) -> GgufTensor:
    dtype = weights.dtype(key)
    if dtype not in _KINDS:
        raise CheckpointError("tensor", key, "is not in fp32, bf16 or fp16; export the model again")
    shape = change(torch.empty(weights.shape(key), dtype=dtype, device="meta")).shape
    return GgufTensor(name, tuple(shape), dtype, lambda: change(weights[key]))


def _stacked(weights: Checkpoint, layer: int, part: Part) -> GgufTensor:
    names = weights.model_map
    keys = [names.expert_key(layer, expert, part) for expert in range(names.experts(weights)[layer])]
    first = _changed(weights, keys[0], _stack_name(layer, part), lambda x: x)
    return dataclasses.replace(
        first, shape=(len(keys), *first.shape), read=lambda: torch.stack([weights[key] for key in keys])
    )


def _of_stack(weights: Checkpoint, key: str) -> Iterator[GgufTensor]:
    """The projections of w_EDF with F = 2G, in which gate and up alternate, or of w_EFD; or their biases."""
    block, _, stack = key.rpartition(".")
    is_bias = stack.endswith("_bias")
    steps = [("gate_proj", 0, 2), ("up_proj", 1, 2)] if stack.startswith("gate_up") else [("down_proj", 0, 1)]
    for name, first, step in steps:

        def part(tensor: Tensor, first: int = first, step: int = step) -> Tensor:
            return (tensor if is_bias else tensor.transpose(1, 2))[:, first::step]

        yield _changed(weights, key, f"{block}.{name}.{'bias' if is_bias else 'weight'}", part)


def _of_halves(weights: Checkpoint, key: str, layer: int) -> Iterator[GgufTensor]:
    """The projections of w_EGD with G = 2F, in which up follows gate, or of w_EDF."""
    parts: tuple[Part, ...] = (
        ("down",) if key == weights.model_map.block_key(layer, "experts.down_proj") else ("gate", "up")
    )
    for number, part in enumerate(parts):

        def share(tensor: Tensor, number: int = number) -> Tensor:
            return tensor.chunk(len(parts), dim=1)[number]

        yield _changed(weights, key, _stack_name(layer, part), share)


def _stack_name(layer: int, part: Part) -> str:
    return f"model.layers.{layer}.mlp.experts.{part}_proj.weight"


def _latent_projections(weights: Checkpoint, key: str) -> Iterator[GgufTensor]:
    """The two halves of w_HCR as llama.cpp uses them.

    The half for keys, transposed, is applied to queries; the half for values is applied to outputs.
    """
    config: dict[str, Any] = weights.config
    heads, keys, values = (int(config[name]) for name in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    rank = weights.shape(key)[1]

    def of_keys(tensor: Tensor) -> Tensor:
        return tensor.view(heads, keys + values, rank)[:, :keys].transpose(1, 2)

    def of_values(tensor: Tensor) -> Tensor:
        return tensor.view(heads, keys + values, rank)[:, keys:]

    yield _changed(weights, key, key.replace("kv_b_proj", "k_b_proj"), of_keys)
    yield _changed(weights, key, key.replace("kv_b_proj", "v_b_proj"), of_values)


def _in_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a projection with neighbouring pairs where the two halves of a head had them."""
    return tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
