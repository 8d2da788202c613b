"""Write a safetensors file with only one tensor in memory at a time; safetensors' own writer needs all tensors at once.

The file starts with the length of its header (8 bytes) and the header: JSON with dtype, shape and byte range of every
tensor. The files are byte for byte those that `safetensors.torch.save_file` writes.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models.mapped_pages import map_pages

STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Supported dtypes by their names in safetensors files; safetensors stores tensors in this order of dtypes."""
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
_ALIGNMENT = 8


class Stored(NamedTuple):
    """Shape and dtype of a tensor to write."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in the file (bytes)."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardFile:
    """A safetensors file whose layout is known in advance, so that its tensors can be written in any order.

    Args:
        path: File to write.
        layout: Shape and dtype of every tensor by name.

    Raises:
        CheckpointError: A dtype is not supported.
        OSError: The disk is full or broken.
    """

    def __init__(self, path: Path, layout: Mapping[str, Stored]) -> None:
        header, self._offsets = _header(layout)
        self._layout, self._missing = layout, set(layout)
        self._file = path.open("wb", buffering=0)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._file.close)
            self._write(memoryview(header))
            on_failure.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def put(self, key: str, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            CheckpointError: The layout has no such tensor, the tensor is already written, or its shape or dtype
                differs.
            OSError: The disk is full or broken.
        """
        if key not in self._missing:
            raise CheckpointError(
                "tensor", key, "is written twice" if key in self._layout else "was not announced for this file"
            )
        found = Stored(tuple(tensor.shape), tensor.dtype)
        if found != self._layout[key]:
            raise CheckpointError("tensor", key, f"is {found}, but {self._layout[key]} was announced")
        self._missing.remove(key)
        self._file.seek(self._offsets[key])
        flat_N = map_pages(tensor.detach().cpu().contiguous()).reshape(-1).view(torch.uint8)
        self._write(flat_N.numpy().data)

    def complete(self) -> None:
        """Check that every tensor is written.

        Raises:
            CheckpointError: A tensor is missing.
        """
        if self._missing:
            raise CheckpointError("tensor", min(self._missing), f"was not written, with {len(self._missing) - 1} more")

    def _write(self, left: memoryview) -> None:
        while left:  # an unbuffered write may write only a part
            left = left[self._file.write(left) :]


def _header(layout: Mapping[str, Stored]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the first tensor, and the byte position of each tensor in the file."""
    order = list(_NAMES)
    if unknown := sorted(key for key, stored in layout.items() if stored.dtype not in order):
        dtype = layout[unknown[0]].dtype
        raise CheckpointError(
            "tensor", unknown[0], f"has dtype {dtype}; convert it to one of {', '.join(STORED_DTYPES)}"
        )
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for key in sorted(layout, key=lambda key: (order.index(layout[key].dtype), key)):
        stored = layout[key]
        starts[key], end = end, end + stored.nbytes
        entries[key] = {"dtype": _NAMES[stored.dtype], "shape": stored.shape, "data_offsets": [starts[key], end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {key: len(header) + start for key, start in starts.items()}
