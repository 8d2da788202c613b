"""The file `metadata.json` of a checkpoint: the file and position of each chunk of each tensor.

`torch.distributed.checkpoint` needs it to reshard a checkpoint over another number of workers. torch would pickle it,
and unpickling can run code; JSON with a strict schema cannot.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from moedisco_ray.training.checkpoints.manifest import Checksum, FileName, Strict

NAME = "metadata.json"

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}

_Sizes = list[NonNegativeInt]


class _Chunk(Strict):
    """A block of a tensor: its position in the tensor, and its bytes in a file."""

    offsets: _Sizes
    shape: _Sizes
    file: FileName
    start: NonNegativeInt
    length: PositiveInt


class _Tensor(Strict):
    dtype: str
    shape: _Sizes
    chunks: Annotated[list[_Chunk], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.dtype} is no dtype of torch")
        for chunk in self.chunks:
            if not len(chunk.offsets) == len(chunk.shape) == len(self.shape):
                raise ValueError("a chunk and its tensor have different numbers of axes")
            bounds = zip(chunk.offsets, chunk.shape, self.shape, strict=True)
            if any(offset + size > whole for offset, size, whole in bounds):
                raise ValueError("a chunk exceeds its tensor")
        return self


class _Layout(Strict):
    version: Literal[1]
    tensors: dict[str, _Tensor]


def layout_bytes(metadata: Metadata, written: Iterable[Any]) -> bytes:
    """The content of `metadata.json`.

    Args:
        metadata: torch's plan of the checkpoint.
        written: torch's `WriteResult` of every chunk, from all workers.

    Raises:
        TypeError: An entry of the checkpoint is no tensor.
    """
    places = {result.index: result.storage_data for result in written}

    def chunk(name: str, stored: ChunkStorageMetadata) -> dict[str, Any]:
        place = places[MetadataIndex(name, stored.offsets)]
        return {
            "offsets": list(stored.offsets),
            "shape": list(stored.sizes),
            "file": place.relative_path,
            "start": place.offset,
            "length": place.length,
        }

    tensors = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise TypeError(f"{name} is no tensor; store it in progress.json instead")
        tensors[name] = {
            "dtype": str(entry.properties.dtype).removeprefix("torch."),
            "shape": list(entry.size),
            "chunks": [chunk(name, stored) for stored in entry.chunks],
        }
    return json.dumps({"version": 1, "tensors": tensors}).encode()


def read_layout(data: bytes, files: Mapping[str, Checksum]) -> Metadata:
    """The metadata of a checkpoint as torch defines it, from the content of `metadata.json`.

    Args:
        data: Content of `metadata.json`.
        files: Checksums of the checkpoint's files; every chunk must be inside one of them.

    Raises:
        ValueError: The content does not have the format of `layout_bytes`.
    """
    layout = _Layout.model_validate_json(data)
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in layout.tensors.items():
        for chunk in tensor.chunks:
            if chunk.file not in files or chunk.start + chunk.length > files[chunk.file].size:
                raise ValueError(f"a chunk of {name} is outside the checkpoint's files")
            places[MetadataIndex(name, chunk.offsets)] = _StorageInfo(chunk.file, chunk.start, chunk.length)
        tensors[name] = TensorStorageMetadata(
            TensorProperties(dtype=_DTYPES[tensor.dtype]),
            torch.Size(tensor.shape),
            [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)) for chunk in tensor.chunks],
        )
    return Metadata(tensors, storage_data=places)
