"""Write Hugging Face model directories from streams of canonical tensors, in safetensors files of limited size."""

from __future__ import annotations

import collections
import errno
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.limits import SHARD_BYTES
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.models.checkpoint import BACKBONE, CONFIG, INDEX, SINGLE, open_file, weight_files, write_config
from moedisco_ray.models.shard_file import ShardFile, Stored

_OS_ERROR = re.compile(r"os error (\d+)")
MOST_WAITING = 32 * 1024**2
"""Maximum size of the tensors that wait to be written (bytes). To compute tensors can take as long as to write them, so
both happen at the same time."""


def write_checkpoint(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    max_shard_bytes: int = SHARD_BYTES,
    *,
    layout: Mapping[str, Stored] | None = None,
    with_backbone: bool = False,
    written: Callable[[Path, Sequence[str]], None] | None = None,
) -> int:
    """Write a model directory from a stream of canonical tensors.

    If `layout` is given, a thread writes tensors while the next ones are computed, and at most 32 MiB wait for it;
    otherwise all tensors of a file are in memory. Memory-mapped tensors take no memory.

    Args:
        directory: Target directory, created if missing. It is incomplete until the function returns.
        tensors: Canonical names and tensors, each name once.
        config: Values of `config.json`.
        max_shard_bytes: Maximum file size (bytes); a larger tensor gets its own file.
        layout: Shape and dtype of every tensor, in the order of `tensors`; None if unknown.
        with_backbone: Whether the model also contains the tensors in the directory `BACKBONE` next to this one. The
            index names their files by relative paths, so both directories must stay next to each other.
        written: Called with each complete file, which gets its final name later, and the names of its tensors.

    Returns:
        Size of the written tensors in bytes.

    Raises:
        CheckpointError: A tensor occurs twice, there are no tensors, or the tensors differ from the layout.
        OSError: The disk is full or broken.
    """
    directory.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    write = (
        _write_shards(directory, _once(tensors, sizes), max_shard_bytes)
        if layout is None
        else _fill_shards(directory, _once(tensors, sizes), layout, max_shard_bytes)
    )
    drafts = []
    for path, keys in write:
        drafts.append((path, keys))
        if written is not None:
            written(path, keys)
    if not sizes:
        raise CheckpointError(str(directory), None, "no tensor to write")
    if len(drafts) == 1 and not with_backbone:
        drafts[0][0].replace(directory / SINGLE)
    else:
        _name_shards(directory, drafts, sum(sizes.values()), _backbone_files(directory) if with_backbone else {})
    write_config(directory, config)
    return sum(sizes.values())


def write_part(
    directory: Path,
    tensor_of: Callable[[str], Tensor],
    layouts: Sequence[Mapping[str, Stored]],
    part: int,
    config: Mapping[str, Any],
) -> list[Path]:
    """Write one worker's files of a model directory that several workers write together.

    Every worker has safetensors files of its own. The first one also writes index and `config.json`.

    Args:
        directory: Target directory, created if missing. It is complete once all workers have returned.
        tensor_of: Returns a canonical tensor of this worker.
        layouts: Shape and dtype of the canonical tensors of every worker, equal on all workers.
        part: Number of this worker, from 0.
        config: Values of `config.json`.

    Returns:
        The files that this worker has written.

    Raises:
        CheckpointError: A tensor is not the announced one.
        OSError: The disk is full or broken.
    """
    directory.mkdir(parents=True, exist_ok=True)
    planned = [(owner, shard) for owner, layout in enumerate(layouts) for shard in _planned_shards(layout, SHARD_BYTES)]
    names = (
        [SINGLE] if len(planned) == 1 else [_shard_name(number, len(planned)) for number in range(1, len(planned) + 1)]
    )
    written = []
    for name, (owner, shard) in zip(names, planned, strict=True):
        if owner == part:
            with ShardFile(directory / name, shard) as file:
                for key in shard:
                    file.put(key, tensor_of(key))
                file.complete()
            written.append(directory / name)
    if part:
        return written
    if len(planned) > 1:
        total = sum(stored.nbytes for layout in layouts for stored in layout.values())
        weight_map = {key: name for name, (_, shard) in zip(names, planned, strict=True) for key in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        written.append(directory / INDEX)
    write_config(directory, config)
    return [*written, directory / CONFIG]


def _once(tensors: Iterable[tuple[str, Tensor]], sizes: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, and store their sizes (bytes) in `sizes`; a second tensor of the same name is an error."""
    for key, tensor in tensors:
        if key in sizes:
            raise CheckpointError("tensor", key, "is written twice")
        sizes[key] = tensor.nbytes
        yield key, tensor


def _write_shards(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
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
    directory: Path, tensors: Iterator[tuple[str, Tensor]], layout: Mapping[str, Stored], max_shard_bytes: int
) -> Iterator[tuple[Path, list[str]]]:
    for number, shard in enumerate(_planned_shards(layout, max_shard_bytes)):
        path = _draft(directory, number)
        with ShardFile(path, shard) as file, _WritingThread(file) as thread:
            for key, tensor in itertools.islice(tensors, len(shard)):
                thread.put(key, tensor)
            thread.finish()
            file.complete()
        yield path, list(shard)
    for key, _ in tensors:
        raise CheckpointError("tensor", key, "was not announced")


class _WritingThread:
    """Writes tensors to a file in a thread. Leaving the context drops the tensors that still wait."""

    def __init__(self, file: ShardFile) -> None:
        self._file = file
        self._executor = ThreadPoolExecutor(1)
        self._waiting: collections.deque[tuple[int, Future[None]]] = collections.deque()
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(cancel_futures=True)

    def put(self, key: str, tensor: Tensor) -> None:
        """Write a tensor later; wait while too many tensors do. Raises what an earlier write has raised."""
        while self._waiting and self._bytes + tensor.nbytes > MOST_WAITING:
            self._finish_one()
        self._waiting.append((tensor.nbytes, self._executor.submit(self._file.put, key, tensor)))
        self._bytes += tensor.nbytes
        if self._bytes > MOST_WAITING:  # a single large tensor
            self.finish()

    def finish(self) -> None:
        """Wait until all tensors are written."""
        while self._waiting:
            self._finish_one()

    def _finish_one(self) -> None:
        size, written = self._waiting.popleft()
        written.result()
        self._bytes -= size


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


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _write_shard(directory: Path, number: int, shard: dict[str, Tensor]) -> tuple[Path, list[str]]:
    path = _draft(directory, number)
    try:
        save_file(shard, path, metadata={"format": "pt"})
    except SafetensorError as error:
        code = _OS_ERROR.search(str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error), str(path)) from error
    return path, list(shard)


def _backbone_files(directory: Path) -> dict[str, str]:
    """The file of each backbone tensor, by name. Paths start from a model directory: `../backbone/FILE`."""
    files: dict[str, str] = {}
    for path in weight_files(directory.parent / BACKBONE):
        files |= dict.fromkeys(open_file(path).keys(), f"../{BACKBONE}/{path.name}")
    return files


def _name_shards(directory: Path, drafts: list[tuple[Path, list[str]]], total: int, shared: Mapping[str, str]) -> None:
    weight_map = dict(shared)
    for number, (path, keys) in enumerate(drafts, start=1):
        name = _shard_name(number, len(drafts))
        path.replace(directory / name)
        weight_map.update(dict.fromkeys(keys, name))
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
