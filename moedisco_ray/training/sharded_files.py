"""Tensors of sharded models in files: each worker reads and writes its own parts; none ever holds a whole model.

A worker that is slow to read or write makes the others wait in a group with a long timeout (`cpu_group`), never in a
collective operation of the training, whose timeout is short.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import Checkpoint, ModelMap, Piece, Stored, reading_thread, write_part
from moedisco_ray.training.consensus import on_all
from moedisco_ray.training.job import World

_TIMEOUT = timedelta(hours=1)
"""Maximum wait for the files of other workers. It may be long, because a dead worker is detected at once without it."""


@contextlib.contextmanager
def cpu_group(world: World) -> Iterator[dist.ProcessGroup | None]:
    """A group of all workers for waits of up to an hour; None for a single worker."""
    if world.size == 1:
        yield None
        return
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


@torch.no_grad()
def read_tensors(targets: Mapping[str, Tensor], stored: Mapping[str, Tensor], names: ModelMap) -> None:
    """Read this worker's parts of tensors.

    Args:
        targets: Tensors to fill, sharded or not, by their names in a transformers model.
        stored: Canonical tensors, such as a `Checkpoint`.
        names: Names of the family.

    Raises:
        CheckpointError: A tensor is missing or has another shape.
    """
    with reading_thread() as reader:
        for key, target in targets.items():
            part, offset = local_part(target)
            pieces = list(names.pieces(key, tuple(target.shape), offset, tuple(part.shape)))
            _check_shapes(names, key, tuple(target.shape), stored)
            if isinstance(stored, Checkpoint):
                stored.read_ahead((piece.name for piece in pieces), reader)
            for piece in pieces:
                part[piece.of_block].copy_(stored[piece.name][piece.of_tensor])


def reader(stored: Checkpoint) -> Callable[[Mapping[str, Tensor]], None]:
    """`read_tensors` from the files of a model."""
    return lambda targets: read_tensors(targets, stored, stored.model_map)


def write_tensors(
    directory: Path,
    parameters: Mapping[str, Tensor],
    config: Mapping[str, Any],
    world: World,
    group: dist.ProcessGroup | None,
    *,
    values: Callable[[str], Tensor] | None = None,
) -> list[Path]:
    """Write a model directory in the canonical form; every worker writes files of its own. Every worker must call it.

    Experts are sharded whole, so each worker writes those that it has. Each other tensor is gathered, one at a time,
    and one worker keeps and writes it.

    Args:
        directory: Target directory. It is complete when the function returns.
        parameters: Parameters, sharded or not, by their names in a transformers model.
        config: Values of `config.json`.
        world: Rank and device of this worker, and the number of workers.
        group: See `cpu_group`.
        values: Returns the tensor to write for a parameter, with dtype and sharding of the parameter; None: the
            parameter itself.

    Returns:
        The files that this worker has written.

    Raises:
        OSError: The disk is full or broken, on any worker.
    """
    names = ModelMap(str(config["model_type"]))
    value_of = values or parameters.__getitem__
    own = {piece.name: (key, piece) for key, piece in _whole_pieces(parameters, names)}
    announced = {
        name: Stored(tuple(local_part(parameters[key])[0][piece.of_block].shape), parameters[key].dtype)
        for name, (key, piece) in own.items()
    }
    layouts = _first_owners(on_all(lambda: announced, world, group))
    known = set().union(*layouts)
    sizes = [_bytes_of(layout) for layout in layouts]
    gathered: dict[str, Tensor] = {}
    for key, parameter in parameters.items():
        places = names.stored_tensors(key, tuple(parameter.shape))
        if places.keys() <= known:
            continue
        value = value_of(key).detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        found = {name: whole[place.index(tuple(whole.shape))] for name, place in places.items()}
        owner = sizes.index(min(sizes))
        layouts[owner].update((name, Stored(tuple(each.shape), each.dtype)) for name, each in found.items())
        sizes[owner] += whole.nbytes
        if owner == world.rank:
            gathered.update((name, each.cpu()) for name, each in found.items())
    # the experts of a layer are in two tensors
    part_of = functools.lru_cache(maxsize=2)(lambda key: local_part(value_of(key))[0])

    def tensor_of(name: str) -> Tensor:
        if name in gathered:
            return gathered[name]
        key, piece = own[name]
        found: Tensor = part_of(key)[piece.of_block]
        return found

    ordered = [dict(sorted(layout.items(), key=lambda item: names.sort_key(item[0]))) for layout in layouts]
    return on_all(lambda: write_part(directory, tensor_of, ordered, world.rank, config), world, group)[world.rank]


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros with the shape and sharding of a tensor, for reading only: they take no memory."""
    part = local_part(tensor)[0]
    return placed_like(part.new_zeros(()).expand(part.shape), tensor)


def placed_like(part: Tensor, tensor: Tensor) -> Tensor:
    """A tensor with the shape and sharding of another one, from this worker's part of it."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(part, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This worker's part of a tensor, and the index of its first element in the tensor."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset


def _whole_pieces(parameters: Mapping[str, Tensor], names: ModelMap) -> Iterator[tuple[str, Piece]]:
    """The canonical tensors that this worker has all of, each with the name of its parameter."""
    for key, parameter in parameters.items():
        part, offset = local_part(parameter)
        for piece in names.pieces(key, tuple(parameter.shape), offset, tuple(part.shape)):
            if piece.is_whole:
                yield key, piece


def _first_owners(layouts: list[dict[str, Stored]]) -> list[dict[str, Stored]]:
    """The layouts, with each tensor that several workers have at the first of them only."""
    known: set[str] = set()
    found = []
    for layout in layouts:
        found.append({key: stored for key, stored in layout.items() if key not in known})
        known |= layout.keys()
    return found


def _bytes_of(layout: Mapping[str, Stored]) -> int:
    return sum(stored.nbytes for stored in layout.values())


def _check_shapes(names: ModelMap, key: str, shape: tuple[int, ...], stored: Mapping[str, Tensor]) -> None:
    for name, place in names.stored_tensors(key, shape).items():
        bounds = place.bounds(shape)[0 if place.expert is None else 1 :]
        needed = tuple(stop - start for start, stop in bounds)
        if name not in stored:
            raise CheckpointError("tensor", name, "is missing; the model is incomplete")
        found = stored.shape(name) if isinstance(stored, Checkpoint) else tuple(stored[name].shape)
        if found != needed:
            raise CheckpointError("tensor", name, f"has shape {list(found)}, but config.json says {list(needed)}")
