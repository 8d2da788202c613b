"""The model in a checkpoint, as a Hugging Face directory: written tensor by tensor, without building the model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moedisco_ray.core.errors import StorageError
from moedisco_ray.models import ModelMap, Stored, write_checkpoint
from moedisco_ray.training.checkpoints import layout
from moedisco_ray.training.checkpoints.checkpoint import ignore_single_process_warning
from moedisco_ray.training.checkpoints.io import LocalCheckpointReader
from moedisco_ray.training.checkpoints.storage import Storage

_MODEL = "model."
"""Prefix of the weights' names in a checkpoint; see `checkpoint.state_of`."""


def write_model_of(storage: Storage, config: Mapping[str, Any], directory: Path) -> int:
    """Write the model of the newest checkpoint, with one tensor in memory.

    The weights are first copied to files next to `directory`, and verified.

    Args:
        storage: Checkpoints of the training.
        config: `config.json` values of the model.
        directory: Directory to write.

    Returns:
        Step of the checkpoint.

    Raises:
        StorageError: There is no checkpoint, it is damaged or was changed, or the storage does not respond.
        OSError: The disk is full or broken.
    """
    step = newest_step(storage)
    checksums = storage.manifest(step)
    metadata = layout.read_layout(storage.read(step, layout.NAME, checksums[layout.NAME]), checksums)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".checkpoint-") as copy:
        for name, parts in _parts(metadata).items():
            storage.copy(step, name, checksums[name], Path(copy) / name, parts)
        weights = {
            key.removeprefix(_MODEL): entry
            for key, entry in metadata.state_dict_metadata.items()
            if key.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
        }
        if config.get("tie_word_embeddings"):
            weights.pop("lm_head.weight", None)
        names = ModelMap(str(config.get("model_type")))
        tensors = _tensors(weights, names, LocalCheckpointReader(copy, metadata))
        write_checkpoint(directory, tensors, config, layout=_stored_tensors(weights, names))
    return step


def newest_step(storage: Storage) -> int:
    """Step of the newest checkpoint.

    Raises:
        StorageError: There is no checkpoint, or the storage does not respond.
    """
    step = max(storage.steps(), default=None)
    if step is None:
        raise StorageError(f"{storage.location} holds no checkpoint yet; wait for the first one")
    return step


def _stored_tensors(weights: Mapping[str, TensorStorageMetadata], names: ModelMap) -> dict[str, Stored]:
    """Shape and dtype of each tensor of the model directory, by its name there."""
    found: dict[str, Stored] = {}
    for key, entry in weights.items():
        size = tuple(entry.size)
        for name, place in names.stored_tensors(key, size).items():
            shape = tuple(stop - start for start, stop in place.bounds(size))
            found[name] = Stored(shape[place.expert is not None :], entry.properties.dtype)
    return found


def _parts(metadata: Metadata) -> dict[str, list[range]]:
    """Positions of the weights in each file."""
    found: dict[str, list[range]] = {}
    for index, place in metadata.storage_data.items():
        if index.fqn.startswith(_MODEL):
            found.setdefault(place.relative_path, []).append(range(place.offset, place.offset + place.length))
    return found


def _tensors(
    weights: Mapping[str, TensorStorageMetadata], names: ModelMap, reader: LocalCheckpointReader
) -> Iterator[tuple[str, Tensor]]:
    """The canonical tensors, in the order of the weights."""
    ignore_single_process_warning()
    for key, entry in weights.items():
        state = {f"{_MODEL}{key}": torch.empty(entry.size, dtype=entry.properties.dtype)}
        dcp.load(state, storage_reader=reader, no_dist=True)
        [tensor] = state.values()
        for name, place in names.stored_tensors(key, tuple(tensor.shape)).items():
            yield name, tensor[place.index(tuple(tensor.shape))]
