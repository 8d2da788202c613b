"""Quantised tensors of published checkpoints, read as bf16: MXFP4 as in gpt-oss, and fp8 as in DeepSeek-V3.

A tensor is dequantised when it is read, so no second copy of the checkpoint is on the disk. In a stack of experts, one
matrix is dequantised at a time.

Shapes: R rows and C columns of a matrix, N groups of n numbers that share a scale.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families.quantisation import Quantisation
from moedisco_ray.models.mapped_pages import drop_pages

_FP8 = "F8_E4M3"
_FP8_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_PACKED_BYTES = 16
"""Bytes that share a scale in MXFP4; each holds two numbers."""
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.bfloat16)
_FP4 = torch.cat([_FP4, -_FP4])
_PAIRS = torch.stack([_FP4.repeat(16), _FP4.repeat_interleave(16)], dim=1).view(torch.int32).flatten()
"""The two bf16 numbers in each byte of MXFP4: the first one is in the lower half of the byte."""
_POWERS = torch.exp2(torch.arange(256) - 127.0).bfloat16()
"""The scale in each byte of scales (E8M0)."""


class Quantised(abc.ABC):
    """A quantised tensor with the methods of a safetensors file that `Checkpoint` calls.

    Args:
        files: The safetensors file of each stored tensor, by name.
        values: Name of the stored tensor with the quantised numbers.
        scales: Name of the stored tensor with their scales.

    Raises:
        CheckpointError: The two tensors do not belong together.
    """

    def __init__(self, files: Mapping[str, Any], values: str, scales: str) -> None:
        self._stored = [(files[name], name) for name in (values, scales)]
        kinds, shapes = [], []
        for file, name in self._stored:
            found = file.get_slice(name)
            kinds.append(found.get_dtype())
            shapes.append(tuple(found.get_shape()))
        shape = self._shape(kinds, *shapes)
        if shape is None:
            raise CheckpointError(
                "tensor",
                values,
                f"is {kinds[0]} {list(shapes[0])} with scales {kinds[1]} {list(shapes[1])}, which do not belong "
                "together; the checkpoint is damaged, or its quantization_config is that of another one",
            )
        self.shape = shape

    def mapped(self) -> list[Tensor]:
        """The quantised numbers and their scales, mapped into memory."""
        return [file.get_tensor(name) for file, name in self._stored]

    def get_tensor(self, _name: str) -> Tensor:
        """The whole tensor in bf16."""
        found, sources = torch.empty(self.shape, dtype=torch.bfloat16), self.mapped()
        matrices = zip(found, *sources, strict=True) if found.ndim == 3 else [(found, *sources)]
        for target_RC, values, scales in matrices:
            self._dequantise(values, scales, target_RC)
            drop_pages(values)
        return found

    def get_slice(self, _name: str) -> Quantised:
        return self

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: int | tuple[int | slice, ...]) -> Tensor:
        """A matrix of a stack, or a part of the matrix, in bf16."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        found_RC, (values, scales) = torch.empty(self.shape[1:], dtype=torch.bfloat16), self.mapped()
        self._dequantise(values[first], scales[first], found_RC)
        return found_RC[tuple(rest)]

    @abc.abstractmethod
    def _shape(self, kinds: list[str], values: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
        """Shape of the dequantised tensor; None if dtypes and shapes of the stored tensors do not fit."""

    @abc.abstractmethod
    def _dequantise(self, values: Tensor, scales: Tensor, target_RC: Tensor) -> None:
        """Write a dequantised matrix to `target_RC`."""


class _Mxfp4(Quantised):
    """Expert matrices of gpt-oss: 4-bit numbers with a power of two as scale, stored transposed.

    transformers' `convert_moe_packed_tensors` does the same on a CPU, but takes nine times as long.
    """

    def _shape(self, kinds: list[str], values: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
        if kinds != ["U8", "U8"] or len(values) != 4 or values != (*scales, _PACKED_BYTES):
            return None
        experts, rows, groups, packed = values
        return experts, groups * packed * 2, rows

    def _dequantise(self, values: Tensor, scales: Tensor, target_RC: Tensor) -> None:
        pairs = torch.index_select(_PAIRS, 0, values.flatten().int()).view(torch.bfloat16)
        factors_N = torch.index_select(_POWERS, 0, scales.flatten().int())
        numbers_Nn = pairs.view(len(factors_N), 2 * _PACKED_BYTES).mul_(factors_N[:, None])
        target_RC.copy_(numbers_Nn.view(len(scales), -1).T)


class _Fp8(Quantised):
    """Matrices of fp8 numbers with a factor per block; transformers refuses those whose size is no multiple of it."""

    def __init__(self, files: Mapping[str, Any], values: str, scales: str, block: tuple[int, int] | None) -> None:
        self._block = block
        super().__init__(files, values, scales)

    def _shape(self, kinds: list[str], values: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...] | None:
        if kinds[0] != _FP8 or kinds[1] not in _FP8_SCALES or len(values) not in (2, 3):
            return None
        if self._block is None:
            return values if scales in ((), (1,), (1, 1)) and len(values) == 2 else None
        blocks = [-(-size // each) for size, each in zip(values[-2:], self._block, strict=True)]
        return values if scales == (*values[:-2], *blocks) else None

    def _dequantise(self, values: Tensor, scales: Tensor, target_RC: Tensor) -> None:
        rows, columns = self._block or tuple(values.shape)
        scales = scales.float().reshape(-(-len(values) // rows), -1)
        for first, scale in zip(range(0, len(values), rows), scales, strict=True):
            part = values[first : first + rows].float()
            target_RC[first : first + rows] = part.mul_(scale.repeat_interleave(columns)[: part.shape[1]])


def dequantised(files: Mapping[str, Any], how: Quantisation) -> dict[str, Any]:
    """The tensors of a quantised checkpoint by the names that they have without quantisation.

    Args:
        files: The safetensors file of each stored tensor, by name.
        how: The checkpoint's quantisation.

    Returns:
        For each tensor a `Quantised`, or its file if it is not quantised.

    Raises:
        CheckpointError: Quantised numbers and their scales do not belong together, or one of them is missing.
    """
    ending, scale_ending = ("_blocks", "_scales") if how.is_mxfp4 else ("", "_scale_inv")
    found: dict[str, Any] = {}
    for name, file in files.items():
        if name.endswith(".activation_scale"):  # for computing in fp8
            continue
        if name.endswith(scale_ending):
            values = name.removesuffix(scale_ending) + ending
            if values not in files:
                raise CheckpointError("tensor", values, f"is missing, but {name} has its scales; download it again")
            continue
        plain = name.removesuffix(ending)
        scales = plain + scale_ending
        if scales in files:
            found[plain] = _Mxfp4(files, name, scales) if how.is_mxfp4 else _Fp8(files, name, scales, how.block)
        elif plain != name or file.get_slice(name).get_dtype() == _FP8:
            raise CheckpointError("tensor", scales, f"is missing, the scales of {name}; download the checkpoint again")
        else:
            found[name] = file
    return found


def mapped_tensors(file: Any, name: str) -> list[Tensor]:
    """The stored tensors that hold a tensor, mapped into memory."""
    return file.mapped() if isinstance(file, Quantised) else [file.get_tensor(name)]
