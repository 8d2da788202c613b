"""Adapters that let `torch.distributed.checkpoint` write to and read from a `Storage`.

torch plans a checkpoint over all workers and reports errors of any worker to all. It writes tensors with `torch.save`,
and reads them with `torch.load(weights_only=True)` from files that are verified block by block as they are read: a
worker that needs a part of a file reads only that part. torch would pickle its metadata; `layout` replaces that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata
from torch.futures import Future

from moedisco_ray.training.checkpoints import layout
from moedisco_ray.training.checkpoints.manifest import Checksum
from moedisco_ray.training.checkpoints.storage import Storage


class CheckpointWriter(FileSystemWriter):
    """Writes the tensor files of a checkpoint, and completes it once all workers have written.

    Args:
        storage: Storage to write to.
        step: Step of the checkpoint.
        extras: Contents of further files, by name.
        on_complete: Called on rank 0 once the checkpoint is complete.
    """

    def __init__(self, storage: Storage, step: int, extras: dict[str, bytes], on_complete: Callable[[], None]) -> None:
        super().__init__(storage.draft_path(step), sync_files=False, per_thread_copy_ahead=0)
        self._storage = storage
        self._step = step
        self._extras = extras
        self._on_complete = on_complete
        self.fs = self._folder = _DraftFolder(storage)
        self.path = storage.draft_path(step)

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        """Remove incomplete checkpoints, on rank 0, before any worker writes."""
        self._storage.begin(self._step)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: Any, planner: Any) -> Future[list[Any]]:
        """Write this worker's tensor files."""
        written = self._storage.retrying(lambda: super(CheckpointWriter, self).write_data(plan, planner)).value()
        results: Future[list[Any]] = Future()
        results.set_result(_Written(written, self._folder.checksums))
        return results

    def finish(self, metadata: Any, results: list[Any]) -> None:
        """Write metadata and manifest, on rank 0, after all workers have written."""
        checksums = {name: checksum for written in results for name, checksum in written.checksums.items()}
        small = {layout.NAME: layout.layout_bytes(metadata, itertools.chain.from_iterable(results)), **self._extras}
        for name, data in small.items():
            checksums[name] = self._storage.write(f"{self.path}/{name}", data)
        self._storage.commit(self._step, checksums)
        self._on_complete()


class LocalCheckpointReader(FileSystemReader):
    """Reads tensor files from a directory, in which they were verified.

    Args:
        directory: The directory.
        metadata: torch's metadata of the checkpoint, from `layout`.
    """

    def __init__(self, directory: Path | str, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata passed to the constructor; torch's own method would unpickle a file."""
        del args, kwargs
        return self._metadata


class CheckpointReader(LocalCheckpointReader):
    """Reads the tensor files of a complete checkpoint; each block is verified before torch sees a byte of it.

    Args:
        storage: Storage to read from.
        step: Step of the checkpoint.
        checksums: Checksums of the files, from the manifest.
        metadata: torch's metadata of the checkpoint, from `layout`.
    """

    def __init__(self, storage: Storage, step: int, checksums: Mapping[str, Checksum], metadata: Metadata) -> None:
        super().__init__(str(step), metadata)
        self.fs = _VerifiedFolder(storage, step, checksums)
        self.path = ""


class _Written(list[Any]):
    """torch's write results of a worker, with the checksums of its files, to be sent to rank 0."""

    def __init__(self, results: list[Any], checksums: dict[str, Checksum]) -> None:
        super().__init__(results)
        self.checksums = checksums


class _DraftFolder(FileSystemBase):
    """The file operations that torch uses to write a draft."""

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
        """Do nothing: files are written under their final names."""

    def mkdir(self, path: Any) -> None:
        """Do nothing: `Storage.begin` creates the folder."""

    def exists(self, path: Any) -> bool:
        del path
        return False

    def rm_file(self, path: Any) -> None:
        """Do nothing: no file exists before it is written."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        del checkpoint_id
        return True


class _VerifiedFolder(_DraftFolder):
    """The file operations that torch uses to read a complete checkpoint."""

    def __init__(self, storage: Storage, step: int, checksums: Mapping[str, Checksum]) -> None:
        super().__init__(storage)
        self._step = step
        self._expected = checksums

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        del mode
        name = _base(path)
        with self._storage.open(self._step, name, self._expected[name]) as file:
            yield file


def _base(path: str) -> str:
    return path.rpartition("/")[2]
