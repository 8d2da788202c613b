"""A folder on any file system that pyarrow supports; operations are retried after errors that may be temporary."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
from pyarrow import fs

from moedisco_ray.core.errors import ConfigError, StorageError
from moedisco_ray.core.store.artifacts import disk_full
from moedisco_ray.core.store.hub import HUB, is_hub
from moedisco_ray.core.store.locations import Location, first_line, is_uri
from moedisco_ray.core.store.manifests import DRAFTS

T = TypeVar("T")

RETRY_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
"""Pauses between attempts, in seconds. Within each attempt, the file system itself may retry too."""
BUFFER = 4 << 20
"""Size of an output stream's buffer, and of the pieces in which files are copied (bytes)."""

_OPTIONS = {"s3": "allow_delayed_open=true", "gs": "retry_limit_seconds=5"}
"""Options of pyarrow's file systems, by scheme: S3 uploads a small object in one request instead of three, and Google
Cloud Storage retries for seconds instead of a quarter of an hour, in which a driver would lose its lease."""

_PERMANENT = re.compile(
    r"NO_SUCH_BUCKET|ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|PERMISSION_DENIED|UNAUTHENTICATED|"
    r"\[(ContainerNotFound|\w*Auth\w+)\]"
)
"""Errors of an object store that no retry cures, in the words of S3, Google Cloud Storage and Azure."""

_log = logging.getLogger(__name__)


def resolve(location: Location) -> tuple[Any, str]:
    """The pyarrow file system of a location, and the location's path in it.

    Raises:
        OSError: The file system cannot be reached.
        pyarrow.ArrowInvalid: The file system is not supported.
    """
    if is_hub(location):
        from moedisco_ray.core.store.hub_files import hub_files  # noqa: PLC0415 - the hub's client is slow to import

        place = str(location).removeprefix(HUB).partition("?")[0].rstrip("/")
        return fs.PyFileSystem(fs.FSSpecHandler(hub_files())), place
    if is_uri(location):
        scheme, _, rest = str(location).partition("://")
        if scheme in ("abfs", "abfss"):
            return _at_azure(str(location))
        option, separator = _OPTIONS.get(scheme, ""), "&" if "?" in rest else "?"
        return fs.FileSystem.from_uri(f"{location}{separator}{option}" if option else str(location))
    return fs.LocalFileSystem(), str(Path(location).absolute())


def _at_azure(uri: str) -> tuple[Any, str]:
    """Like `resolve`, but check that there is a credential: without one, pyarrow ends the process at an object."""
    system, path = fs.FileSystem.from_uri(uri)
    try:
        system.get_file_info(path)
    except OSError:  # may be temporary, so it is left to the first operation
        pass
    except pa.ArrowException as error:
        if "AuthenticationException" not in str(error):
            raise
        raise OSError(
            "this machine has no credential for Azure; give it a managed identity, or log in with `az login`"
        ) from error
    return system, path


class Stored(NamedTuple):
    """Size (bytes) and SHA-256 of an object."""

    size: int
    sha256: str


class Info(NamedTuple):
    """Size of an object (bytes), and the time at which it was written (s since the epoch, by the store's clock)."""

    size: int
    modified: float


class Remote:
    """A folder at a path or URI that every machine can reach.

    Failed operations are retried with growing pauses for some minutes. On a local disk they are not retried.

    Args:
        location: Path or URI of the folder.
        setting: Name of the setting that holds the location, for error messages.
        pauses: Pauses between attempts, in seconds; by default, `RETRY_PAUSES`.

    Raises:
        ConfigError: The file system or bucket does not exist, or denies access.
        StorageError: The folder does not respond, or has lost a file.
        RunDirError: The disk is full.
    """

    def __init__(self, location: Location, setting: str, pauses: Sequence[float] | None = None) -> None:
        self.location = location
        self._pauses = pauses
        self._setting = setting
        try:
            self.system, self.root = resolve(location)
        except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise self._misconfigured(error) from error
        self.on_disk = isinstance(self.system, fs.LocalFileSystem)

    def retrying(self, operation: Callable[[], T]) -> T:
        """Run an operation, and retry it after errors that may be temporary."""
        for pause in (*(RETRY_PAUSES if self._pauses is None else self._pauses), None):
            try:
                return operation()
            except FileNotFoundError as error:
                raise StorageError(f"{self.location} has lost a file ({first_line(error)})") from error
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise disk_full(Path(self.root)) from error
                if self.on_disk:
                    raise StorageError(f"{self.location} fails ({first_line(error)})") from error
                if _PERMANENT.search(str(error)):
                    raise self._misconfigured(error) from error
                if pause is None:
                    raise StorageError(f"{self.location} does not answer ({first_line(error)})") from error
                _log.warning("%s: %s; retrying in %g s", self.location, first_line(error), pause)
            # Jitter: all trainers of the run may be waiting for the same storage.
            time.sleep(pause * random.uniform(0.5, 1.0))
        raise AssertionError("the last attempt returns or raises")

    def read(self, name: str) -> bytes | None:
        """Content of an object; None if it does not exist."""

        def get() -> bytes | None:
            try:
                with self.system.open_input_stream(self.path(name)) as stream:
                    data: bytes = stream.read()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return data

        return self.retrying(get)

    def write(self, name: str, data: bytes) -> None:
        """Write a small object; a reader sees either the old or the new content."""
        self.retrying(lambda: self._put(name, lambda stream: stream.write(data)))

    def upload(self, file: Path, name: str) -> Stored:
        """Upload a local file as an object; return the object's size and SHA-256."""

        def put() -> Stored:
            digest, size = hashlib.sha256(), 0

            def copy(stream: Any) -> None:
                nonlocal size
                with file.open("rb") as source:
                    while piece := source.read(BUFFER):
                        stream.write(piece)
                        digest.update(piece)
                        size += len(piece)

            self._put(name, copy)
            return Stored(size, digest.hexdigest())

        return self.retrying(put)

    def download(self, name: str, file: Path, size: int | None = None, sha256: str | None = None) -> None:
        """Download an object to a local file; the file appears only when it is complete.

        Args:
            name: Name of the object.
            file: The local file.
            size: Expected size of the object (bytes); None if the size is not checked.
            sha256: Expected checksum of the object; None if the checksum is not checked.

        Raises:
            StorageError: The object has another size or checksum, also when it is downloaded a second time.
        """

        def get() -> Stored:
            digest, received = hashlib.sha256(), 0
            with self.system.open_input_stream(self.path(name)) as source, draft.open("wb") as target:
                while piece := source.read(BUFFER):
                    target.write(piece)
                    digest.update(piece)
                    received += len(piece)
            return Stored(received, digest.hexdigest())

        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            for _ in range(2):  # twice: the object may be intact and only the first transfer damaged
                found = self.retrying(get)
                if size in (None, found.size) and sha256 in (None, found.sha256):
                    draft.replace(file)
                    return
        finally:
            draft.unlink(missing_ok=True)
        raise StorageError(
            f"{name} in {self.location} is damaged: it has {found.size} bytes or another checksum; the command of the "
            "run that wrote it makes it again with --repair"
        )

    def checksum(self, name: str) -> Stored:
        """Size and SHA-256 of an object, which is read and not stored; (0, "") if it does not exist."""

        def read() -> Stored:
            digest, size = hashlib.sha256(), 0
            with self.system.open_input_stream(self.path(name)) as source:
                while piece := source.read(BUFFER):
                    digest.update(piece)
                    size += len(piece)
            return Stored(size, digest.hexdigest())

        try:
            return self.retrying(read)
        except FileNotFoundError:
            return Stored(0, "")

    def list(self, name: str = "") -> dict[str, int]:
        """Size (bytes) of each object below a folder, or of one object, by name relative to `location`; or none."""
        return {found: info.size for found, info in self.details(name).items()}

    def details(self, name: str = "") -> dict[str, Info]:
        """Like `list`, but with the size and the time of writing of each object."""

        def found() -> dict[str, Info]:
            itself = self.system.get_file_info(self.path(name))
            below = fs.FileSelector(self.path(name), allow_not_found=True, recursive=True)
            infos = [itself] if itself.type == fs.FileType.File else self.system.get_file_info(below)
            named = {info.path[len(self.root) :].strip("/"): info for info in infos if info.type == fs.FileType.File}
            return {
                each: Info(info.size, info.mtime_ns / 1e9)
                for each, info in named.items()
                if not each.startswith(f"{DRAFTS}/")
            }

        return self.retrying(found)

    def modified(self, name: str) -> float | None:
        """Time at which an object was written (s since the epoch, by the store's clock); None if it does not exist."""
        info = self.info(name)
        return None if info is None else info.modified

    def info(self, name: str) -> Info | None:
        """Size and time of writing of an object; None if the object does not exist."""

        def found() -> Info | None:
            info = self.system.get_file_info(self.path(name))
            return None if info.type != fs.FileType.File else Info(info.size, info.mtime_ns / 1e9)

        return self.retrying(found)

    def open(self, name: str) -> Any:
        """Open an object as a pyarrow file that can be read from any position."""
        return self.retrying(lambda: self.system.open_input_file(self.path(name)))

    def read_in_place(self, name: str, read: Callable[[Any], T]) -> T:
        """Result of a function of an open object."""

        def opened() -> T:
            with self.system.open_input_file(self.path(name)) as file:
                return read(file)

        return self.retrying(opened)

    def delete(self, name: str) -> None:
        """Delete an object, if it exists."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.system.delete_file(self.path(name))

        self.retrying(remove)

    def delete_folder(self, name: str) -> None:
        """Delete all objects below a folder."""

        def remove() -> None:
            # pyarrow's Google Cloud Storage raises no FileNotFoundError for a missing folder.
            if self.system.get_file_info(self.path(name)).type != fs.FileType.NotFound:
                with contextlib.suppress(FileNotFoundError):
                    self.system.delete_dir(self.path(name))

        self.retrying(remove)

    def path(self, name: str) -> str:
        """Path of an object in the pyarrow file system."""
        return f"{self.root}/{name}" if name else self.root

    def _put(self, name: str, fill: Callable[[Any], object]) -> None:
        with self._appearing(self.path(name)) as path:
            try:
                stream = self.system.open_output_stream(path, buffer_size=BUFFER)
            except FileNotFoundError as error:  # on Google Cloud Storage, the bucket does not exist
                raise self._misconfigured(error) from error
            with stream:
                fill(stream)

    @contextlib.contextmanager
    def _appearing(self, path: str) -> Iterator[str]:
        """Yield a path to write to.

        Readers see only complete objects: a file on a disk is renamed when it is complete.
        """
        if self.on_disk:
            folder, _, base = path.rpartition("/")
            draft = f"{folder}/.{base}.{uuid.uuid4().hex}"
            self.system.create_dir(folder)
            yield draft
            os.replace(draft, path)  # noqa: PTH105  # pyarrow's path is a string
        elif self.system.type_name == "abfs":
            # On Azure, pyarrow empties an object when it opens it. A copy within a storage account replaces it as a
            # whole.
            draft = self.path(f"{DRAFTS}/{uuid.uuid4().hex}")
            yield draft
            self.system.copy_file(draft, path)
            with contextlib.suppress(FileNotFoundError):
                self.system.delete_file(draft)
        else:
            yield path

    def _misconfigured(self, error: Exception) -> ConfigError:
        remedy = f"cannot be used ({first_line(error)}); name a location that you may write to"
        return ConfigError(self._setting, str(self.location), remedy)
