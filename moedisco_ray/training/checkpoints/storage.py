"""Checkpoint storage: a folder on a file system of pyarrow, where a checkpoint appears complete or not at all.

    LOCATION/step-0000100/__0_0.distcp ...   chunks of weights and optimizer state, a file per worker
                          metadata.json      file and position of each chunk; see `layout`
                          progress.json      a `checkpoint.Progress`
                          manifest.json      size and checksums of the other files, signed, written last; see `manifest`

A checkpoint is complete when its manifest exists and every file has the size in it. It is read only if the manifest's
signature is valid, since others may be able to write to the storage. On a disk, a checkpoint is renamed to its final
name when it is complete. An object store cannot rename, but an object appears there only after its last byte has
arrived. (The parts of an interrupted upload stay there unseen; a lifecycle rule of the bucket,
AbortIncompleteMultipartUpload, removes them.) On Azure, pyarrow creates the object empty first; an empty manifest is no
valid one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

from moedisco_ray.core.errors import StorageError
from moedisco_ray.core.store.checksums import sync
from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.remote import BUFFER, Remote
from moedisco_ray.training.checkpoints.manifest import (
    Checksum,
    HashingStream,
    Manifest,
    is_of_another_version,
    signing_key,
)
from moedisco_ray.training.checkpoints.verified_file import VerifiedFile

T = TypeVar("T")

MANIFEST = "manifest.json"

_NAME = re.compile(r"step-(\d{7,})")

_log = logging.getLogger(__name__)


class Storage:
    """The checkpoints of one training.

    Failed operations are retried for some minutes with growing pauses, except on a disk.

    Args:
        location: Folder of these checkpoints alone; every worker must see it.
        key_file: File of the key that signs manifests. It is in the run directory, never in the storage, and is created
            when first needed. With None, checkpoints can be listed and deleted, but not written or read.

    Raises:
        ConfigError: The file system or bucket does not exist, or denies access.
        StorageError: The storage does not respond, or a checkpoint is damaged.
        RunDirError: The disk is full.
    """

    def __init__(self, location: Location, key_file: Path | None = None) -> None:
        self.location = location
        self._key_file = key_file
        self._remote = Remote(location, "checkpoint.storage")
        self._system, self._root, self._on_disk = self._remote.system, self._remote.root, self._remote.on_disk

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return self.retrying(lambda: [step for name in self._names() if (step := self._step(name)) is not None])

    def manifest(self, step: int) -> dict[str, Checksum]:
        """Checksums of the files of a complete checkpoint, by name.

        Raises:
            StorageError: The signature was invalid for this training and step in two reads; the checkpoint is deleted,
                so that the next attempt resumes from the previous checkpoint. Or the key is missing; then the
                checkpoint is kept.
        """
        key = self._key(existing=True)
        for _ in range(2):  # the file may be intact and only its transfer damaged
            with contextlib.suppress(ValueError):
                manifest = self.retrying(lambda: self._manifest(folder_name(step)))
                if manifest.is_signed(step, key):
                    return manifest.files
        self.discard(step)
        raise StorageError(
            f"{MANIFEST} of checkpoint {folder_name(step)} in {self.location} was not written by this training for "
            "this step: it was changed, or copied from elsewhere; the checkpoint is deleted"
        )

    def draft_path(self, step: int) -> str:
        return self._path(f".{folder_name(step)}.draft" if self._on_disk else folder_name(step))

    def begin(self, step: int) -> None:
        """Prepare for a new checkpoint: delete what interrupted saves have left."""

        def clear() -> None:
            for name in self._names():
                if self._path(name) == self.draft_path(step) or self._step(name) is None:
                    self._delete(name)
            if self._on_disk:
                self._system.create_dir(self.draft_path(step))

        self.retrying(clear)

    def commit(self, step: int, checksums: Mapping[str, Checksum]) -> None:
        """Make a checkpoint complete; `checksums` maps the name of each of its files to the checksum.

        Raises:
            RunDirError: The key in the run directory cannot be read or created.
        """
        manifest = Manifest.signed(step, checksums, self._key())
        self.write(f"{self.draft_path(step)}/{MANIFEST}", f"{manifest.model_dump_json(indent=2)}\n".encode())
        if self._on_disk:
            self.retrying(lambda: self._rename_draft(step, (*checksums, MANIFEST)))

    def discard(self, step: int) -> None:
        self.retrying(lambda: self._delete(folder_name(step)))

    def abandon(self, step: int) -> None:
        """Delete a failed draft from a disk; in an object store, the next call of `begin` deletes it."""
        if self._on_disk:
            with contextlib.suppress(OSError):
                self._system.delete_dir(self.draft_path(step))

    def remove(self) -> None:
        """Delete all checkpoints, complete or not."""
        self._remote.delete_folder("")

    def write(self, path: str, data: bytes) -> Checksum:
        """Write a small file at a path; returns its checksum."""

        def put() -> Checksum:
            with self.writing(path) as stream:
                stream.write(data)
                return stream.checksum

        return self.retrying(put)

    @contextlib.contextmanager
    def writing(self, path: str) -> Iterator[HashingStream]:
        """Open a file for writing, without retries."""
        with self._system.open_output_stream(path, buffer_size=BUFFER) as stream:
            yield HashingStream(stream)

    @contextlib.contextmanager
    def open(self, step: int, name: str, checksum: Checksum) -> Iterator[io.BufferedReader[VerifiedFile]]:
        """Open a file of a complete checkpoint. Each block is verified before a byte of it can be read.

        Raises:
            StorageError: While reading: the checksum of a block was wrong in two reads. The checkpoint is deleted, so
                that the next attempt resumes from the previous checkpoint.
        """

        def block(index: int) -> bytes:
            for _ in range(2):  # the file may be intact and only its transfer damaged
                data = self.retrying(lambda: self.get(f"{folder_name(step)}/{name}", checksum.block(index)))
                if checksum.matches(index, data):
                    return data
                _log.warning("%s: %s of %s has a wrong checksum", self.location, name, folder_name(step))
            self.discard(step)
            raise StorageError(
                f"{name} of checkpoint {folder_name(step)} in {self.location} is damaged; the checkpoint is deleted"
            )

        verified = VerifiedFile(checksum, block)
        with io.BufferedReader(verified, BUFFER) as file:
            try:
                yield file
            finally:
                verified.check()

    def read(self, step: int, name: str, checksum: Checksum) -> bytes:
        """Content of a file of a complete checkpoint; errors are those of `open`."""
        with self.open(step, name, checksum) as file:
            return file.read(checksum.size)

    def copy(self, step: int, name: str, checksum: Checksum, target: Path, parts: Sequence[range]) -> None:
        """Copy some bytes of a file of a complete checkpoint to a sparse file on this machine, at the same positions.

        Args:
            step: Step of the checkpoint.
            name: Name of the file.
            checksum: Checksum of the file, from the manifest.
            target: File to write.
            parts: Positions of the bytes.

        Raises:
            StorageError: As in `open`.
        """
        with self.open(step, name, checksum) as source, target.open("wb") as file:
            for part in parts:
                source.seek(part.start)
                file.seek(part.start)
                left = len(part)
                while left and (data := source.read(min(left, BUFFER))):
                    left -= file.write(data)

    def retrying(self, operation: Callable[[], T]) -> T:
        """Run an operation, and retry it after errors that may be temporary."""
        return self._remote.retrying(operation)

    def _rename_draft(self, step: int, files: Iterable[str]) -> None:
        for file in files:
            sync(Path(f"{self.draft_path(step)}/{file}"))
        self._delete(folder_name(step))
        self._system.move(self.draft_path(step), self._path(folder_name(step)))
        sync(Path(self._root))

    def _names(self) -> list[str]:
        # Google Cloud Storage has no folders: pyarrow lists only files there.
        selector = fs.FileSelector(self._root, allow_not_found=True, recursive=not self._on_disk)
        found = [
            (info, info.path[len(self._root) :].strip("/").split("/")) for info in self._system.get_file_info(selector)
        ]
        return sorted({parts[0] for info, parts in found if info.type == fs.FileType.Directory or parts[1:]})

    def _step(self, name: str) -> int | None:
        """Step of the complete checkpoint with this folder name; None for any other name.

        Raises:
            StorageError: The manifest is damaged, and the checkpoint is deleted, so that the next attempt resumes from
                the previous one. Or another version wrote the checkpoint, so it must not be deleted.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        try:
            files = self._manifest_read_twice(name).files
        except FileNotFoundError:
            return None
        except ValueError as error:
            content = self.get(f"{name}/{MANIFEST}")
            if not content.rstrip().endswith(b"}"):  # its end was never written: no checkpoint yet
                return None
            if is_of_another_version(content):
                raise StorageError(
                    f"checkpoint {name} in {self.location} was written by another version of moedisco-ray; continue it "
                    "with that version, or delete it to train from the beginning"
                ) from error
            self._delete(name)
            raise StorageError(
                f"{MANIFEST} of checkpoint {name} in {self.location} is damaged; the checkpoint is deleted"
            ) from error
        try:
            infos = self._system.get_file_info(fs.FileSelector(self._path(name)))
        except FileNotFoundError:
            return None
        sizes = {info.base_name: info.size for info in infos}
        return int(match[1]) if all(sizes.get(file) == checksum.size for file, checksum in files.items()) else None

    def _manifest_read_twice(self, name: str) -> Manifest:
        try:
            return self._manifest(name)
        # `begin` deletes checkpoints without a valid manifest, but perhaps only this transfer was damaged
        except ValueError:
            return self._manifest(name)

    def _manifest(self, name: str) -> Manifest:
        return Manifest.model_validate_json(self.get(f"{name}/{MANIFEST}"))

    def _key(self, *, existing: bool = False) -> bytes:
        if self._key_file is None:
            raise ValueError("a storage without a key can only list and delete checkpoints")
        if existing and not self._key_file.exists():
            raise StorageError(
                f"{self._key_file}, the key that signed the checkpoints in {self.location}, is missing: restore it, or "
                "delete the checkpoints to start from the beginning"
            )
        return signing_key(self._key_file)

    def get(self, name: str, positions: range | None = None) -> bytes:
        """Content of a file, or of a part of it."""
        if positions is not None:
            with self._system.open_input_file(self._path(name)) as file:
                part: bytes = file.read_at(len(positions), positions.start)
            return part
        with self._system.open_input_stream(self._path(name)) as stream:
            data: bytes = stream.read()
        return data

    def _delete(self, name: str) -> None:
        # The manifest goes first: a half-deleted checkpoint must not look complete.
        with contextlib.suppress(FileNotFoundError):
            self._system.delete_file(self._path(f"{name}/{MANIFEST}"))
        self._remote.delete_folder(name)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def folder_name(step: int) -> str:
    return f"step-{step:07d}"
