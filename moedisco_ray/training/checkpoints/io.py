"""`torch.distributed.checkpoint`, writing to and reading from a `Storage`.

It plans together over all workers, and every worker learns of what went wrong on any. torch writes each tensor with `torch.save`,
and reads it with `torch.load(weights_only=True)` after the file's checksum was verified. Its metadata, which it would pickle, is
replaced: see `layout`.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata
from torch.futures import Future

from moedisco_ray.training.checkpoints import layout
from moedisco_ray.training.checkpoints.manifest import Checksum
from moedisco_ray.training.checkpoints.storage import Storage


class ShardWriter(FileSystemWriter):
    """Writes a checkpoint's shards, and makes it complete when all are there.

    Args:
        storage: Where to.
        step: The checkpoint's step.
        extras: Further files.
        finished: Called on rank 0 once the checkpoint is complete.
    """

    def __init__(self, storage: Storage, step: int, extras: dict[str, bytes], finished: Callable[[], None]) -> None:
        super().__init__(storage.draft(step), sync_files=False, per_thread_copy_ahead=0)
        self._storage = storage
        self._step = step
        self._extras = extras
        self._finished = finished
        self.fs = self._folder = _Folder(storage)
        self.path = storage.draft(step)

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """Clean up, on rank 0, before any worker writes."""
        self._storage.begin(self._step)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Future[list[Any]]:
        """Write this worker's shards."""
        written = self._storage.patiently(lambda: super(ShardWriter, self).write_data(plan, planner)).value()
        results: Future[list[Any]] = Future()
        results.set_result(_Written(written, self._folder.checksums))
        return results

    def finish(self, metadata: Any, results: list[Any]) -> None:
        """Write metadata and manifest, on rank 0, when all workers have written."""
        checksums = {name: checksum for written in results for name, checksum in written.checksums.items()}
        small = {layout.NAME: layout.layout_bytes(metadata, itertools.chain.from_iterable(results)), **self._extras}
        for name, data in small.items():
            checksums[name] = self._storage.write(f"{self.path}/{name}", data)
        self._storage.commit(self._step, checksums)
        self._finished()


class ShardReader(FileSystemReader):
    """Reads a complete checkpoint's shards; no byte of a file is used before its checksum was verified.

    Args:
        storage: Where from.
        step: The checkpoint's step.
        checksums: Its files, as its manifest has them.
        metadata: What is stored in them.
    """

    def __init__(self, storage: Storage, step: int, checksums: Mapping[str, Checksum], metadata: Metadata) -> None:
        super().__init__(str(step))
        self.fs = _Verified(storage, step, checksums)
        self.path = ""
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, which was read and checked before; torch's own method would unpickle a file."""
        del args, kwargs
        return self._metadata


class _Written(list[Any]):
    """What a worker wrote, and the checksums of its files, on their way to rank 0."""

    def __init__(self, results: list[Any], checksums: dict[str, Checksum]) -> None:
        super().__init__(results)
        self.checksums = checksums


class _Folder(FileSystemBase):
    """A draft that shards are written to."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.checksums: dict[str, Checksum] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        del mode
        with self._storage.writing(path) as stream:
            yield stream
        self.checksums[_base(path)] = stream.checksum

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        """Nothing is renamed: a shard is written under its name."""

    def mkdir(self, path: Any) -> None:
        """`Storage.begin` makes the folder."""

    def exists(self, path: Any) -> bool:
        del path
        return False

    def rm_file(self, path: Any) -> None:
        """Nothing exists before it is written."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        del checkpoint_id
        return True


class _Verified(_Folder):
    """A complete checkpoint."""

    def __init__(self, storage: Storage, step: int, checksums: Mapping[str, Checksum]) -> None:
        super().__init__(storage)
        self._step = step
        self._expected = checksums

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        del mode
        name = _base(path)
        yield io.BytesIO(self._storage.read(self._step, name, self._expected[name]))


def _base(path: str) -> str:
    return path.rpartition("/")[2]
