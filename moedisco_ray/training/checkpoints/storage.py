"""Where checkpoints are stored: a folder on any file system that pyarrow reads, in which each appears complete or not at all.

    LOCATION/step-0000100/__0_0.distcp ...   shards of weights and optimizer state, a file per worker
                          metadata.json      which part of which tensor is stored where; see `layout`
                          progress.json      where the training stood
                          manifest.json      written last: size and SHA-256 of every other file, signed; see `manifest`

A checkpoint is complete when its manifest is there, and every file with the size that it says. It is read only if the manifest's
signature fits: others may be able to write to the storage. On a disk it also gets its name only when it is complete. An object
store has no renaming; but there no object appears before its last byte has arrived. (The parts of an upload that was cut off stay
there unseen: a lifecycle rule of the bucket, AbortIncompleteMultipartUpload, frees them.)
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from pyarrow import fs

from moedisco_ray.core.artifacts import disk_full
from moedisco_ray.core.errors import ConfigError, StorageError
from moedisco_ray.core.locations import Location, first_line, resolve
from moedisco_ray.training.checkpoints.manifest import Checksum, HashingStream, Manifest, is_of_another_version, signing_key

T = TypeVar("T")

MANIFEST = "manifest.json"

_PATIENCE = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
"""Seconds between attempts; the file systems' own ones come on top."""

_NAME = re.compile(r"step-(\d{7,})")
_BUFFER = 4 << 20
_HOPELESS = re.compile(r"NO_SUCH_BUCKET|ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH")

_log = logging.getLogger(__name__)


class Storage:
    """The checkpoints of one training.

    What fails is tried again for some minutes, with growing pauses, unless it is a disk that fails.

    Args:
        location: A folder for these checkpoints alone; every worker must see it.
        key_file: File of the key that signs manifests, made with the first checkpoint; in the run directory, never in the storage.
            None: checkpoints can be listed and deleted, not written or read.

    Raises:
        ConfigError: There is no such file system or bucket, or it refuses us.
        StorageError: It does not answer, or what it holds is damaged.
        RunDirError: The disk is full.
    """

    def __init__(self, location: Location, key_file: Path | None = None) -> None:
        self.location = location
        self._key_file = key_file
        try:
            self._system, self._root = resolve(location)
        except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self._misconfigured(error) from error
        self._on_disk = isinstance(self._system, fs.LocalFileSystem)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return self.patiently(lambda: [step for name in self._names() if (step := self._step(name)) is not None])

    def manifest(self, step: int) -> dict[str, Checksum]:
        """The files of a complete checkpoint.

        Raises:
            StorageError: The manifest, read twice, is not what this training signed for this step. The checkpoint is dropped:
                the next attempt continues from the one before. Or its key is gone: then the checkpoint stays.
        """
        key = self._key(existing=True)
        for _ in range(2):   # the file may be whole, and the way from the storage at fault
            with contextlib.suppress(ValueError):
                manifest = self.patiently(lambda: self._manifest(_name(step)))
                if manifest.is_signed(step, key):
                    return manifest.files
        self.discard(step)
        raise StorageError(
            f"{MANIFEST} of checkpoint {_name(step)} in {self.location} was not written by this training for this step: it was "
            "changed, or copied from elsewhere; the checkpoint is dropped")

    def draft(self, step: int) -> str:
        """The path under which a checkpoint is written."""
        return self._path(f".{_name(step)}.draft" if self._on_disk else _name(step))

    def begin(self, step: int) -> None:
        """Make room for a checkpoint: whatever is not complete is left over from a save that was cut off."""
        def clear() -> None:
            for name in self._names():
                if self._path(name) == self.draft(step) or self._step(name) is None:
                    self._delete(name)
            if self._on_disk:
                self._system.create_dir(self.draft(step))
        self.patiently(clear)

    def commit(self, step: int, checksums: Mapping[str, Checksum]) -> None:
        """Make a checkpoint complete.

        Args:
            step: The checkpoint's step.
            checksums: Those of all its files.

        Raises:
            RunDirError: The key in the run directory cannot be read or made.
        """
        manifest = Manifest.signed(step, checksums, self._key())
        self.write(f"{self.draft(step)}/{MANIFEST}", f"{manifest.model_dump_json(indent=2)}\n".encode())
        if self._on_disk:
            self.patiently(lambda: self._publish(step, (*checksums, MANIFEST)))

    def discard(self, step: int) -> None:
        """Drop a checkpoint."""
        self.patiently(lambda: self._delete(_name(step)))

    def abandon(self, step: int) -> None:
        """Free what a draft takes of a disk; elsewhere the next `begin` does."""
        if self._on_disk:
            with contextlib.suppress(OSError):
                self._system.delete_dir(self.draft(step))

    def remove(self) -> None:
        """Drop everything."""
        self.patiently(lambda: self._delete_folder(self._root))

    def write(self, path: str, data: bytes) -> Checksum:
        """Write a small file."""
        def put() -> Checksum:
            with self.writing(path) as stream:
                stream.write(data)
                return stream.checksum
        return self.patiently(put)

    @contextlib.contextmanager
    def writing(self, path: str) -> Iterator[HashingStream]:
        """A stream into a file; one attempt."""
        with self._system.open_output_stream(path, buffer_size=_BUFFER) as stream:
            yield HashingStream(stream)

    def read(self, step: int, name: str, checksum: Checksum) -> bytes:
        """A file of a complete checkpoint.

        Raises:
            StorageError: It is not what was written, read twice. The checkpoint is dropped: the next attempt continues from the one
                before.
        """
        data = self.patiently(lambda: self._get(f"{_name(step)}/{name}"))
        if Checksum.of(data) != checksum:   # the file may be whole, and the way from the storage at fault
            _log.warning("%s: %s of %s is not what was written; once more", self.location, name, _name(step))
            data = self.patiently(lambda: self._get(f"{_name(step)}/{name}"))
        if Checksum.of(data) != checksum:
            self.discard(step)
            raise StorageError(f"{name} of checkpoint {_name(step)} in {self.location} is damaged; the checkpoint is dropped")
        return data

    def patiently(self, operation: Callable[[], T]) -> T:
        """Do it, again and again where it fails for a reason that may pass."""
        for pause in (*_PATIENCE, None):
            try:
                return operation()
            except FileNotFoundError as error:
                raise StorageError(f"{self.location} has lost a file ({first_line(error)})") from error
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise disk_full(Path(self._root)) from error
                if self._on_disk:
                    raise StorageError(f"{self.location} fails ({first_line(error)})") from error
                if _HOPELESS.search(str(error)):
                    raise self._misconfigured(error) from error
                if pause is None:
                    raise StorageError(f"{self.location} does not answer ({first_line(error)})") from error
                _log.warning("%s: %s; once more in %g s", self.location, first_line(error), pause)
            # Not all at once: where a storage was away, every trainer of the run waits for it.
            time.sleep(pause * random.uniform(0.5, 1.0))
        raise AssertionError("the last attempt returns or raises")

    def _publish(self, step: int, files: Iterable[str]) -> None:
        """Give a draft its name, once all of it is on the disk itself."""
        for file in files:
            _sync(f"{self.draft(step)}/{file}")
        self._delete(_name(step))
        self._system.move(self.draft(step), self._path(_name(step)))
        _sync(self._root)

    def _names(self) -> list[str]:
        # Google Cloud Storage has no folders, and pyarrow tells of none there: only of what lies in them.
        selector = fs.FileSelector(self._root, allow_not_found=True, recursive=not self._on_disk)
        found = [(info, info.path[len(self._root):].strip("/").split("/")) for info in self._system.get_file_info(selector)]
        return sorted({parts[0] for info, parts in found if info.type == fs.FileType.Directory or parts[1:]})

    def _step(self, name: str) -> int | None:
        """The step of a complete checkpoint, None for anything else.

        Raises:
            StorageError: Another version wrote it: it is not ours to delete.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        try:
            files = self._manifest_or_again(name).files
        except FileNotFoundError:
            return None
        except ValueError as error:
            if is_of_another_version(self._get(f"{name}/{MANIFEST}")):
                raise StorageError(
                    f"checkpoint {name} in {self.location} was written by another version of moedisco-ray; continue it with that "
                    "version, or delete it to train from the beginning") from error
            return None
        try:
            infos = self._system.get_file_info(fs.FileSelector(self._path(name)))
        except FileNotFoundError:
            return None
        sizes = {info.base_name: info.size for info in infos}
        return int(match[1]) if all(sizes.get(file) == checksum.size for file, checksum in files.items()) else None

    def _manifest_or_again(self, name: str) -> Manifest:
        try:
            return self._manifest(name)
        except ValueError:   # once more here too: `begin` clears away what has no manifest
            return self._manifest(name)

    def _manifest(self, name: str) -> Manifest:
        return Manifest.model_validate_json(self._get(f"{name}/{MANIFEST}"))

    def _key(self, *, existing: bool = False) -> bytes:
        if self._key_file is None:
            raise ValueError("a storage without a key can only list and delete checkpoints")
        if existing and not self._key_file.exists():
            raise StorageError(
                f"{self._key_file}, the key that signed the checkpoints in {self.location}, is gone: put it back, or delete the "
                "checkpoints to begin anew")
        return signing_key(self._key_file)

    def _get(self, name: str) -> bytes:
        with self._system.open_input_stream(self._path(name)) as stream:
            data: bytes = stream.read()
        return data

    def _delete(self, name: str) -> None:
        # What makes it complete goes first: half a checkpoint must not pass for a whole one.
        with contextlib.suppress(FileNotFoundError):
            self._system.delete_file(self._path(f"{name}/{MANIFEST}"))
        self._delete_folder(self._path(name))

    def _delete_folder(self, path: str) -> None:
        # Asked first: pyarrow's Google Cloud Storage does not say of a folder that is not there that it was not found.
        if self._system.get_file_info(path).type == fs.FileType.NotFound:
            return
        with contextlib.suppress(FileNotFoundError):
            self._system.delete_dir(path)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _misconfigured(self, error: Exception) -> ConfigError:
        remedy = f"cannot be used ({first_line(error)}); name a place that you may write to"
        return ConfigError("checkpoint.storage", str(self.location), remedy)


def _name(step: int) -> str:
    return f"step-{step:07d}"


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
