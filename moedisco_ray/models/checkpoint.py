"""Read Hugging Face model directories tensor by tensor.

A `Checkpoint` offers the canonical tensors, with separate tensors for each expert, even if the files store the experts
of a layer in one stack. The directory may have one or several safetensors files. Tensors are read on access, one at a
time. `checkpoint_writer` always writes canonical tensors, which other tools can read, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import language_model
from moedisco_ray.core.families.quantisation import QUANTISED, Quantisation, quantisation
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.core.store.read_roots import opened
from moedisco_ray.models.layout import ModelMap, Place
from moedisco_ray.models.mapped_pages import map_pages, read_soon
from moedisco_ray.models.quantised import dequantised, mapped_tensors
from moedisco_ray.models.shard_file import STORED_DTYPES, Stored

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_AHEAD = 64
"""Number of tensors that `stream` reads ahead: enough to keep a disk busy, and few enough for the page cache."""
BACKBONE = "backbone"
"""Name of a directory that stores the tensors that all model directories next to it share."""


class Checkpoint(Mapping[str, Tensor]):
    """A model directory as a read-only mapping from canonical names to tensors, which are read on access.

    Attributes:
        config: Values of the model's `config.json`.
        model_map: Names of the model's tensors.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        model_map: ModelMap,
        files: Mapping[str, Any],
        places: Mapping[str, Place],
    ) -> None:
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
        found = stored[place.index(tuple(stored.get_shape()))]
        return found.T.contiguous() if place.transposed else found

    def of_stack(self, key: str, expert: int) -> Tensor:
        """An expert of a canonical tensor that is a stack, without the others."""
        place = self._places[key]
        found: Tensor = self._files[place.key].get_slice(place.key)[expert]
        return found

    def read_ahead(self, keys: Iterable[str], reader: Executor) -> None:
        """Start reading tensors into the page cache, because reading a mapped file page by page on access is slow.

        Args:
            keys: Names of the tensors.
            reader: Thread that asks for them. Finding them takes time, and the operating system lets it wait once the
                disk has many requests.
        """
        reader.submit(self._read_soon, {self._places[key].key for key in keys})

    def _read_soon(self, stored: Iterable[str]) -> None:
        tensors = [tensor for name in stored for tensor in mapped_tensors(self._files[name], name)]
        read_soon(sorted(tensors, key=Tensor.data_ptr))  # in the file's order

    def stream(self) -> Generator[tuple[str, Tensor], None, None]:
        """Yield all canonical tensors with their names, in order, and read the files ahead."""
        keys, announced = list(self), 0
        with reading_thread() as reader:
            for number, key in enumerate(keys):
                if number >= announced - _AHEAD // 2:
                    self.read_ahead(keys[announced : announced + _AHEAD], reader)
                    announced += _AHEAD
                yield key, map_pages(self[key])

    def __contains__(self, key: object) -> bool:
        return key in self._places  # a Mapping's own method reads the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a canonical tensor, from the file's header."""
        place = self._places[key]
        return place.shape(tuple(self._files[place.key].get_slice(place.key).get_shape()))

    def layout(self, dtype: torch.dtype | None = None) -> dict[str, Stored]:
        """Shape and dtype of every canonical tensor, in order, from the headers of the files.

        Args:
            dtype: Dtype to return instead of the stored ones, except for tensors that `ModelMap.keeps_dtype`.

        Raises:
            CheckpointError: A tensor's dtype is not in `STORED_DTYPES`.
        """
        found = {}
        for key in self:
            stored = self.dtype(key) if dtype is None or self.model_map.keeps_dtype(key) else dtype
            if stored is None:
                raise CheckpointError(
                    "tensor", key, f"of {self.directory} is none of {', '.join(STORED_DTYPES)}; convert it"
                )
            found[key] = Stored(self.shape(key), stored)
        return found

    def dtype(self, key: str) -> torch.dtype | None:
        """Dtype of a canonical tensor, from the file's header; None if `STORED_DTYPES` lacks this dtype."""
        stored = self._places[key].key
        return STORED_DTYPES.get(self._files[stored].get_slice(stored).get_dtype())


def open_checkpoint(directory: Path, names: ModelMap | None = None) -> Checkpoint:
    """Open a model directory for reading.

    Args:
        directory: A Hugging Face model directory.
        names: Maps the names of stored tensors to canonical names. By default this is the map of the family in
            `config.json`.

    Raises:
        CheckpointError: The family is not supported, the weights are pickled or quantised in a way that cannot be read,
            a file is missing or broken, or a tensor is unknown or stored twice.
    """
    config, how = read_config(directory), stored_quantisation(directory)
    model_map = ModelMap(str(config.get("model_type"))) if names is None else names
    left_out, composite = _prediction_layers(config, model_map), model_map.family.composite
    files = _stored_tensors(directory)
    if how is not None:
        files = dequantised(files, how)
    places: dict[str, Place] = {}
    for stored, file in files.items():
        if stored == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # this tensor is a copy of the embedding; transformers ignores it too
        if stored.startswith(left_out) or stored.endswith(model_map.family.derived):
            continue
        name = stored if composite is None else composite.own_name(stored)
        if name is None:
            continue
        for key, place in model_map.stored_tensors(name, tuple(file.get_slice(stored).get_shape())).items():
            if key in places:
                raise _stored_twice(directory, key)
            places[key] = dataclasses.replace(place, key=stored)
    if _stacks_are_transposed(places.values(), files, config):
        places = {key: dataclasses.replace(place, transposed=place.expert is not None) for key, place in places.items()}
    ordered = dict(sorted(places.items(), key=lambda item: model_map.sort_key(item[0])))
    return Checkpoint(directory, config, model_map, files, ordered)


def _stacks_are_transposed(places: Iterable[Place], files: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether stacks of experts have their last two axes in the other order, as in published Qwen3-VL.

    Their shapes show it, if an expert's matrices are not all square.
    """
    halves = {place.key: place.half for place in places if place.expert is not None}
    for stored, half in halves.items():
        _, rows, columns = files[stored].get_slice(stored).get_shape()
        hidden, inside = (rows, columns) if half is None else (columns, rows)
        if hidden != config.get("hidden_size") == inside:
            return True
    return False


def _stored_tensors(directory: Path) -> dict[str, Any]:
    """The open file of each tensor, by the tensor's stored name."""
    found: dict[str, Any] = {}
    for path in weight_files(directory):
        file = open_file(path)
        for name in file.keys():  # noqa: SIM118  # a safetensors file is no mapping
            if name in found:
                raise _stored_twice(directory, name)
            found[name] = file
    return found


def _stored_twice(directory: Path, name: str) -> CheckpointError:
    return CheckpointError(str(directory), name, "the tensor is stored twice; the checkpoint is inconsistent")


def _prediction_layers(config: Mapping[str, Any], model_map: ModelMap) -> tuple[str, ...]:
    """Prefixes of the tensors of layers that predict further tokens, which are not part of the model."""
    field = model_map.family.prediction_layers_field
    if field is None:
        return ()
    if model_map.family.prediction_prefix is not None:
        return (model_map.family.prediction_prefix,)
    first = int(config["num_hidden_layers"])
    return tuple(f"model.layers.{layer}." for layer in range(first, first + int(config.get(field) or 0)))


def read_config(directory: Path) -> dict[str, Any]:
    """The values of a model directory's `config.json`; of a composite model, those of its language model.

    They are those of the model as it is read here, without the quantisation of its weights.

    Raises:
        CheckpointError: The file is missing or broken.
    """
    values = language_model(_read_object(directory, CONFIG))
    return {name: value for name, value in values.items() if name != QUANTISED}


def stored_quantisation(directory: Path) -> Quantisation | None:
    """How the weights in a model directory are quantised; None if they are not.

    Raises:
        CheckpointError: The `config.json` is missing or broken, or weights quantised in this way cannot be read.
    """
    return quantisation(language_model(_read_object(directory, CONFIG)), "checkpoint", str(directory))


def read_generation_config(directory: Path) -> dict[str, Any] | None:
    """The values of a model directory's `generation_config.json`; None if it has no such file.

    Raises:
        CheckpointError: The file is broken.
    """
    return _read_object(directory, GENERATION_CONFIG) if (directory / GENERATION_CONFIG).exists() else None


def _read_object(directory: Path, name: str) -> dict[str, Any]:
    try:
        with opened(directory / name) as path:
            values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError("checkpoint", str(directory), f"holds no readable {name} ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError("checkpoint", str(directory), f"{name} holds no JSON object")
    return values


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    write_json(directory / CONFIG, dict(sorted(config.items())))


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory; some of them may be in the directory `BACKBONE` next to it.

    Raises:
        CheckpointError: There are no such files, or the index cannot be read or names a file elsewhere.
    """
    if (directory / INDEX).is_file():
        index = directory / INDEX
        try:
            with opened(index) as found:
                names = set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values())
            outside = [name for name in names if Path(name).name != name.removeprefix(f"../{BACKBONE}/")]
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError("checkpoint", str(index), f"the index cannot be read ({error!r})") from error
        if outside:
            raise CheckpointError("checkpoint", str(index), f"names a file outside its directory: {outside[0]}")
        return sorted(directory / name for name in names)
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if pickled := sorted([*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]):
        raise CheckpointError(
            "checkpoint",
            str(pickled[0]),
            "pickled weights run code when they are read; convert them to safetensors "
            "(load the model once where you trust it and call save_pretrained)",
        )
    raise CheckpointError("checkpoint", str(directory), f"holds neither {SINGLE} nor {INDEX}")


@contextlib.contextmanager
def reading_thread() -> Iterator[Executor]:
    """A thread for `Checkpoint.read_ahead`, which ends with the block and drops what it has not begun."""
    reader = ThreadPoolExecutor(1, "read-ahead")
    try:
        yield reader
    finally:
        reader.shutdown(cancel_futures=True)


def open_file(path: Path) -> Any:
    """Open a safetensors file, mapped into memory.

    Raises:
        CheckpointError: The file is missing or broken.
    """
    try:
        with opened(path) as found:
            return safe_open(found, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError("checkpoint", str(path), f"the file is missing or broken ({error})") from error
