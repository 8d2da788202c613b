"""`torch.distributed.checkpoint`, writing to and reading from a `Storage`.

It plans together over all workers, and every worker learns of what went wrong on any.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.futures import Future

from moedisco_ray.training.storage import Seal, SealedStream, Storage

METADATA = ".metadata"


class ShardWriter(FileSystemWriter):
    """Writes a checkpoint's shards, and makes it complete when all are there.

    Args:
        storage: Where to.
        step: The checkpoint's.
        extras: Files beside the shards.
        finished: Called on rank 0 once it is complete.
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
        """Clean up, on rank 0, before anybody writes."""
        self._storage.begin(self._step)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Future[list[Any]]:
        """Write this worker's shards."""
        written = self._storage.patiently(lambda: super(ShardWriter, self).write_data(plan, planner)).value()
        results: Future[list[Any]] = Future()
        results.set_result(_Written(written, self._folder.seals))
        return results

    def finish(self, metadata: Any, results: list[Any]) -> None:
        """On rank 0, when all workers have written."""
        self._storage.patiently(lambda: super(ShardWriter, self).finish(metadata, results))
        seals = {name: seal for written in results for name, seal in written.seals.items()} | self._folder.seals
        for name, data in self._extras.items():
            seals[name] = self._storage.write(f"{self.path}/{name}", data)
        self._storage.commit(self._step, seals)
        self._finished()


class ShardReader(FileSystemReader):
    """Reads a complete checkpoint's shards; no byte of them is used before its whole file was found to be what was written.

    Args:
        storage: Where from.
        step: The checkpoint's.
        seals: Its manifest.
        metadata: Its file of that name: torch passes over a failure to read it.
    """

    def __init__(self, storage: Storage, step: int, seals: dict[str, Seal], metadata: bytes) -> None:
        super().__init__(str(step))
        self.fs = _Sealed(storage, step, seals, metadata)
        self.path = ""


class _Written(list[Any]):
    """What a worker wrote, and the seals of its files, on their way to rank 0."""

    def __init__(self, results: list[Any], seals: dict[str, Seal]) -> None:
        super().__init__(results)
        self.seals = seals


class _Folder(FileSystemBase):
    """A draft that shards are written to."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.seals: dict[str, Seal] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[SealedStream]:
        del mode
        with self._storage.writing(path) as stream:
            yield stream
        self.seals[_base(path)] = stream.seal

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: Any) -> Any:
        return path

    def rename(self, path: Any, new_path: Any) -> None:
        self._storage.rename(path, new_path)
        self.seals[_base(new_path)] = self.seals.pop(_base(path))

    def mkdir(self, path: Any) -> None:
        """`Storage.begin` does."""

    def exists(self, path: Any) -> bool:
        del path
        return False

    def rm_file(self, path: Any) -> None:
        """Nothing is there before it is written."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        del checkpoint_id
        return True


class _Sealed(_Folder):
    """A complete checkpoint."""

    def __init__(self, storage: Storage, step: int, seals: dict[str, Seal], metadata: bytes) -> None:
        super().__init__(storage)
        self._step = step
        self._metadata = metadata
        self.seals = seals

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.BytesIO]:  # type: ignore[override]  # it reads
        del mode
        name = _base(path)
        yield io.BytesIO(self._metadata if name == METADATA else self._storage.read(self._step, name, self.seals[name]))


def _base(path: str) -> str:
    return path.rpartition("/")[2]
