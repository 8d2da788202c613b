"""Hugging Face model directories: read and write them tensor by tensor.

A reader sees the canonical tensors, whether a directory has one safetensors file or several, with experts stored one by one or
stacked. Tensors are read on access, one at a time. Files are always written in the canonical per-expert form, which other tools
can read.
"""

from __future__ import annotations

import errno
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moedisco_ray.core.artifacts import write_json
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.read_roots import opened
from moedisco_ray.models.layout import ModelMap, Place
from moedisco_ray.models.shard_file import STORED_DTYPES, ShardFile, Stored

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
BACKBONE = "backbone"
"""Name of a directory with the tensors that the model directories next to it have in common."""
_OS_ERROR = re.compile(r"os error (\d+)")
DEFAULT_SHARD_BYTES = 2 * 1024**3
"""Maximum size of a safetensors file (bytes)."""


class Checkpoint(Mapping[str, Tensor]):
    """A model directory as a read-only mapping from canonical names to tensors, which are read on access.

    Attributes:
        config: Values of its `config.json`.
        model_map: Names of its tensors.
    """

    def __init__(self, directory: Path, config: dict[str, Any], model_map: ModelMap,
                 files: Mapping[str, Any], places: Mapping[str, Place]) -> None:
        self.directory = directory
        self.config = config
        self.model_map = model_map
        self._files = files
        self._places = places

    def __getitem__(self, key: str) -> Tensor:
        place = self._places[key]
        file = self._files[place.key]
        if place.expert is None:
            return file.get_tensor(place.key)
        stored = file.get_slice(place.key)
        return stored[place.index(tuple(stored.get_shape()))]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a canonical tensor; only the file's header is read."""
        place = self._places[key]
        stored = tuple(self._files[place.key].get_slice(place.key).get_shape())
        if place.expert is None:
            return stored
        return stored[1:] if place.half is None else (stored[1] // 2, *stored[2:])

    def layout(self, dtype: torch.dtype | None = None) -> dict[str, Stored]:
        """Shape and dtype of every canonical tensor, in order; only headers are read.

        Args:
            dtype: Dtype to announce for all tensors; None: the stored ones.

        Raises:
            CheckpointError: A tensor's dtype is not in `STORED_DTYPES`.
        """
        found = {}
        for key in self:
            stored = dtype or self.dtype(key)
            if stored is None:
                raise CheckpointError("tensor", key, f"of {self.directory} is none of {', '.join(STORED_DTYPES)}; convert it")
            found[key] = Stored(self.shape(key), stored)
        return found

    def dtype(self, key: str) -> torch.dtype | None:
        """Dtype of a canonical tensor, None if it is not in `STORED_DTYPES`; only the file's header is read."""
        stored = self._places[key].key
        return STORED_DTYPES.get(self._files[stored].get_slice(stored).get_dtype())


def open_checkpoint(directory: Path, names: ModelMap | None = None) -> Checkpoint:
    """Open a model directory for reading.

    Args:
        directory: A Hugging Face model directory.
        names: Names of the stored tensors; None: the names of the family in `config.json`.

    Raises:
        CheckpointError: The family is not supported, the weights are pickled, a file is missing or broken, or a tensor is unknown
            or stored twice.
    """
    config = read_config(directory)
    model_map = ModelMap(str(config.get("model_type"))) if names is None else names
    files: dict[str, Any] = {}
    places: dict[str, Place] = {}
    for path in weight_files(directory):
        file = _open(path)
        for stored in file.keys():  # noqa: SIM118  # a safetensors file is no mapping
            if stored == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue    # a copy of the embedding, which transformers ignores too
            files[stored] = file
            for key, place in model_map.stored_tensors(stored, tuple(file.get_slice(stored).get_shape())).items():
                if key in places:
                    raise CheckpointError(str(path), key, "the tensor is stored twice; the checkpoint is inconsistent")
                places[key] = place
    ordered = dict(sorted(places.items(), key=lambda item: model_map.sort_key(item[0])))
    return Checkpoint(directory, config, model_map, files, ordered)


def write_checkpoint(directory: Path, tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any],
                     max_shard_bytes: int = DEFAULT_SHARD_BYTES, *, layout: Mapping[str, Stored] | None = None,
                     with_backbone: bool = False) -> int:
    """Write a model directory from a stream of canonical tensors.

    With a layout one tensor is in memory at a time, without one a file. Tensors of files that are mapped into memory do not count.

    Args:
        directory: Target directory, created if missing. It is incomplete until the function returns.
        tensors: Canonical names and tensors, each name once.
        config: Values of `config.json`.
        max_shard_bytes: Maximum file size (bytes); a larger tensor gets its own file.
        layout: Shape and dtype of every tensor, in the order of `tensors`; None: unknown.
        with_backbone: Whether the tensors in the directory `BACKBONE` next to this one belong to the model too. The index names
            their files by relative paths, so the model can be read as long as both directories have the same parent.

    Returns:
        Size of the written tensors in bytes.

    Raises:
        CheckpointError: A tensor occurs twice, there are no tensors, or they are not those of the layout.
        OSError: The disk is full or broken.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    write = _write_shards(directory, _once(tensors, sizes), max_shard_bytes) if layout is None else _fill_shards(
        directory, _once(tensors, sizes), layout, max_shard_bytes)
    drafts = list(write)
    if not sizes:
        raise CheckpointError(str(directory), None, "no tensor to write")
    if len(drafts) == 1 and not with_backbone:
        drafts[0][0].replace(directory / _SINGLE)
    else:
        _name_shards(directory, drafts, sum(sizes.values()), _backbone_files(directory) if with_backbone else {})
    write_config(directory, config)
    return sum(sizes.values())


def read_config(directory: Path) -> dict[str, Any]:
    """The values of a model directory's `config.json`.

    Raises:
        CheckpointError: The file is missing or broken.
    """
    try:
        with opened(directory / "config.json") as path:
            config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError("checkpoint", str(directory), f"holds no readable config.json ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError("checkpoint", str(directory), "config.json holds no JSON object")
    return config


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Write the `config.json` of a model directory."""
    write_json(directory / "config.json", dict(sorted(config.items())))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, which may include those of the directory `BACKBONE` next to it.

    Raises:
        CheckpointError: There are none, or the index cannot be read or names a file elsewhere.
    """
    if (directory / _INDEX).is_file():
        index = directory / _INDEX
        try:
            with opened(index) as found:
                names = set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError("checkpoint", str(index), f"the index cannot be read ({error!r})") from error
        if outside := [name for name in names if Path(name).name != name.removeprefix(f"../{BACKBONE}/")]:
            raise CheckpointError("checkpoint", str(index), f"names a file outside its directory: {outside[0]}")
        return sorted(directory / name for name in names)
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if pickled := sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]):
        raise CheckpointError(
            "checkpoint", str(pickled[0]), "pickled weights run code when they are read; convert them to safetensors "
            "(load the model once where you trust it and call save_pretrained)")
    raise CheckpointError("checkpoint", str(directory), f"holds neither {_SINGLE} nor {_INDEX}")


def _open(path: Path) -> Any:
    try:
        with opened(path) as found:
            return safe_open(found, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError("checkpoint", str(path), f"the file is missing or broken ({error})") from error


def _once(tensors: Iterable[tuple[str, Tensor]], sizes: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors; their sizes in bytes are added to `sizes`."""
    for key, tensor in tensors:
        if key in sizes:
            raise CheckpointError("tensor", key, "is written twice")
        sizes[key] = tensor.nbytes
        yield key, tensor


def _write_shards(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int,
) -> Iterator[tuple[Path, list[str]]]:
    shard: dict[str, Tensor] = {}
    size = number = 0
    for key, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield _write_shard(directory, number, shard)
            shard, size, number = {}, 0, number + 1
        shard[key] = _contiguous_copy(tensor)
        size += tensor.nbytes
    if shard:
        yield _write_shard(directory, number, shard)


def _fill_shards(
    directory: Path, tensors: Iterator[tuple[str, Tensor]], layout: Mapping[str, Stored], max_shard_bytes: int,
) -> Iterator[tuple[Path, list[str]]]:
    for number, shard in enumerate(_planned_shards(layout, max_shard_bytes)):
        path = _draft(directory, number)
        with ShardFile(path, shard) as file:
            for key, tensor in itertools.islice(tensors, len(shard)):
                file.put(key, tensor)
            file.complete()
        yield path, list(shard)
    for key, _ in tensors:
        raise CheckpointError("tensor", key, "was not announced")


def _planned_shards(layout: Mapping[str, Stored], max_shard_bytes: int) -> Iterator[dict[str, Stored]]:
    shard: dict[str, Stored] = {}
    size = 0
    for key, stored in layout.items():
        if shard and size + stored.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[key] = stored
        size += stored.nbytes
    if shard:
        yield shard


def _contiguous_copy(tensor: Tensor) -> Tensor:
    # A view would keep its whole base tensor alive, and safetensors refuses two views of one storage.
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _draft(directory: Path, number: int) -> Path:
    return directory / f".shard-{number:05d}.draft"


def _write_shard(directory: Path, number: int, shard: dict[str, Tensor]) -> tuple[Path, list[str]]:
    path = _draft(directory, number)
    try:
        save_file(shard, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = _OS_ERROR.search(str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error), str(path)) from error
    return path, list(shard)


def _backbone_files(directory: Path) -> dict[str, str]:
    """The file of every tensor of the backbone, relative to a directory next to it."""
    files = weight_files(directory.parent / BACKBONE)
    return {key: f"../{BACKBONE}/{path.name}" for path in files for key in _open(path).keys()}  # noqa: SIM118  # no mapping


def _name_shards(directory: Path, drafts: list[tuple[Path, list[str]]], total: int, shared: Mapping[str, str]) -> None:
    weight_map = dict(shared)
    for number, (path, keys) in enumerate(drafts, start=1):
        name = f"model-{number:05d}-of-{len(drafts):05d}.safetensors"
        path.replace(directory / name)
        weight_map.update(dict.fromkeys(keys, name))
    write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
