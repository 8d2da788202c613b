"""Reads the files of a run in the same way, whether the run is in a directory or at a URI."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from moedisco_ray.core.errors import ConfigError, StorageError
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.checksums import Entries
from moedisco_ray.core.store.locations import Location, first_line, is_uri, joined
from moedisco_ray.core.store.manifests import LEASE, MANIFEST, OBJECTS, RECEIPTS, attempt_of, entries_of
from moedisco_ray.core.store.run_store import RunStore
from service import run_files
from service.database.sharers import Share
from service.domain.run_paths import RunPaths, is_id
from service.errors import NotFound, StorageUnavailable
from service.schemas import Artifact

if TYPE_CHECKING:
    from moedisco_ray.core.store.remote import Remote

MOST_BYTES = 256 * 2**20
"""Maximum size of a file that is read whole (bytes)."""
_PAUSES = ()
"""Pauses between attempts to reach a URI. There are none: the file system already retries for some seconds, and a
client waits."""
_MOST_STORES = 64
"""Number of runs at URIs whose connections are kept."""
_INTERNAL = frozenset({OBJECTS, RECEIPTS, LEASE})


class StoredFile(Protocol):
    """An open file of a run."""

    @property
    def size(self) -> int:
        """Size of the file when it was opened (bytes)."""

    @property
    def modified(self) -> float:
        """Time of the last change, in seconds since the epoch."""

    @property
    def etag(self) -> str:
        """ETag; it changes when the file changes."""

    @property
    def poll_seconds(self) -> float:
        """Interval at which to poll the file for new content, in seconds."""

    def read_at(self, start: int, count: int) -> bytes:
        """Up to `count` bytes from `start` on, also those written since the file was opened; empty at its end."""

    def close(self) -> None:
        """Close the file."""


class RunStorage(Protocol):
    """Access to the files of a run, by their paths below the run directory."""

    def open(self, path: str) -> StoredFile:
        """Open a file.

        Raises:
            FileNotFoundError: The file does not exist.
            OSError: The file cannot be opened.
        """

    def files(self, folder: str = "") -> list[Artifact]:
        """List the files in a folder and its subfolders, sorted by path, except those whose names begin with a dot."""


def storage_of(location: Location) -> RunStorage:
    """Access to the files of a run in a directory or at a URI.

    Raises:
        StorageUnavailable: The URI cannot be reached.
    """
    return UriRun(_store(str(location))) if is_uri(location) else DirectoryRun(Path(location))


def read(storage: RunStorage, path: str, most: int = MOST_BYTES) -> bytes | None:
    """Content of a file of a run; None if it does not exist.

    Raises:
        NotFound: The file is too large to be read whole.
        OSError: The file cannot be read.
    """
    try:
        file = storage.open(path)
    except FileNotFoundError:
        return None
    content = io.BytesIO()
    with contextlib.closing(file):
        while (size := content.tell()) <= most and (block := file.read_at(size, min(2**20, most + 1 - size))):
            content.write(block)
    if size > most:
        raise NotFound(f"{path} is larger than {most >> 20} MiB and is not shown; download it instead")
    return content.getvalue()  # without a copy


@dataclasses.dataclass(frozen=True)
class DirectoryRun:
    """A run in a directory; symbolic links are not followed."""

    directory: Path

    def open(self, path: str) -> StoredFile:
        """Open a regular file."""
        return _LocalFile(run_files.open_regular(self.directory, path))

    def files(self, folder: str = "") -> list[Artifact]:
        """List the regular files in a folder."""
        found = []
        for below, folders, names, number in run_files.walk(self.directory, folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                try:
                    state = os.stat(name, dir_fd=number, follow_symlinks=False)
                except OSError:  # a stage has just replaced the file
                    continue
                if stat.S_ISREG(state.st_mode) and not name.startswith(".") and name.isprintable():
                    path = "/".join(filter(None, (folder, below, name)))
                    found.append(Artifact(path=path, bytes=state.st_size, updated=state.st_mtime))
        return sorted(found, key=lambda file: file.path)


class _LocalFile:
    poll_seconds = 0.5

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        state = os.fstat(file.fileno())
        self.size, self.modified = state.st_size, state.st_mtime
        self.etag = f'"{state.st_ino:x}-{state.st_mtime_ns:x}-{state.st_size:x}"'

    def read_at(self, start: int, count: int) -> bytes:
        return os.pread(self._file.fileno(), count, start)

    def close(self) -> None:
        self._file.close()


@dataclasses.dataclass(frozen=True)
class UriRun:
    """A run at a URI; manifests may name only objects of the run itself."""

    store: RunStore

    def open(self, path: str) -> StoredFile:
        """Open a file."""
        with _reaching(self.store.location):
            name = self.store.object_of(path)
            if name is None or (name != path and not _is_object(name)):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return _RemoteFile(self.store.remote, name)

    def files(self, folder: str = "") -> list[Artifact]:
        """List the files in a folder: those that are stored under their own names, and those that manifests list."""
        with _reaching(self.store.location):
            remote = self.store.remote
            found = remote.details(folder)
            loose = {name: info for name, info in found.items() if name.partition("/")[0] not in _INTERNAL}
            shown = dict(loose)
            for name in loose:
                owner, _, last = name.rpartition("/")
                if last != MANIFEST or not owner:
                    continue
                entries = _own_entries(remote.read(name))
                for attempt in {attempt_of(entry.object) for entry in entries.values()} if folder else ():
                    found |= remote.details(attempt)
                shown |= {
                    f"{owner}/{each}": found[entry.object] for each, entry in entries.items() if entry.object in found
                }
            return [
                Artifact(path=path, bytes=info.size, updated=float(int(info.modified)))
                for path, info in sorted(shown.items())
                if path.isprintable() and not _is_hidden(path)
            ]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


class _RemoteFile:
    """A file in an object store.

    Its times are in whole seconds, because some responses of a store are not more precise.
    """

    poll_seconds = 5.0  # a driver uploads its growing files at this interval

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote, self._name = remote, name
        self._open()

    def _open(self) -> None:
        info = self._remote.info(self._name)
        if info is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._name)
        self._file: Any = self._remote.open(self._name)
        self.size, self.modified = info.size, float(int(info.modified))
        self.etag = f'"{hashlib.sha256(f"{self._name} {info}".encode()).hexdigest()[:32]}"'

    def read_at(self, start: int, count: int) -> bytes:
        with _reaching(self._remote.location):
            if start >= self.size:
                info = self._remote.info(self._name)
                if info is None or info.size <= start:
                    return b""
                self.close()
                self._open()
            content: bytes = self._file.read_at(min(count, self.size - start), start)
            return content

    def close(self) -> None:
        self._file.close()


def stored_bytes(directory: Path, location: Location) -> tuple[int, dict[str, Share]]:
    """Size of the files of a run that have one name, in its home and at its URI (bytes), and its other files.

    Files with several names are by the folder of their stage, or by an empty name if they are elsewhere. A file that
    several stages have is in the folder of the first of them. So a run that has taken stages from another one has the
    same files in them, whatever its later stages have.

    Raises:
        StorageUnavailable: The URI cannot be reached.
    """
    local, linked = run_files.sizes_of(RunPaths(directory).home)
    shares = _shares(directory.name, linked)
    if not is_uri(location):
        return local, shares
    with _reaching(location):
        return local + sum(_store(str(location)).remote.list().values()), shares


def _shares(name: str, linked: Sequence[run_files.Linked]) -> dict[str, Share]:
    order = {stage.directory: number for number, stage in enumerate(STAGES)}
    by_folder: dict[str, dict[tuple[int, int], int]] = defaultdict(dict)
    seen: set[tuple[int, int]] = set()
    tops = ((file.folder.removeprefix(name).lstrip("/").partition("/")[0], file) for file in linked)
    named = [(top if top in order else "", file) for top, file in tops]
    for folder, file in sorted(named, key=lambda each: (order.get(each[0], len(order)), each)):
        number = (file.disk, file.number)
        if number not in seen:
            seen.add(number)
            by_folder[folder][number] = file.bytes
    return {
        folder: Share(hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest(), sum(files.values()))
        for folder, files in by_folder.items()
    }


def folder_bytes(folder: Location) -> int:
    """Size of all files below a directory or URI (bytes); 0 if it is absent.

    Raises:
        StorageUnavailable: The URI cannot be reached.
    """
    if not is_uri(folder):
        return run_files.size_of(Path(folder))
    with _reaching(folder):
        return sum(RunStore.of(str(folder), _PAUSES).remote.list().values())


def run_folders(root: Location) -> dict[str, float]:
    """Folders below a storage root that are named like runs, with the time of their newest file (s since the epoch).

    Raises:
        StorageUnavailable: The URI cannot be reached.
    """
    newest: dict[str, float] = {}
    for path, modified in _files_at(root):
        parts = path.split("/")[:-1]
        named = next((number for number, part in enumerate(parts, 1) if is_id(part)), None)
        if named is not None:
            folder = str(joined(root, *parts[:named]))
            newest[folder] = max(modified, newest.get(folder, 0.0))
    return newest


def _files_at(root: Location) -> Iterator[tuple[str, float]]:
    """Path and time of each file and folder below a directory, or of each object below a URI.

    A folder's path ends with a slash.
    """
    if is_uri(root):
        with _reaching(root):
            yield from [
                (name, info.modified) for name, info in RunStore.of(str(root), _PAUSES).remote.details().items()
            ]
        return
    for below, _, names, number in run_files.walk(Path(root)):
        yield f"{below}/", os.fstat(number).st_mtime
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a driver has just removed it
                yield f"{below}/{name}", os.stat(name, dir_fd=number, follow_symlinks=False).st_mtime


def documents_at(location: Location) -> str:
    """Glob pattern of the corpus documents of a finished run at a URI.

    Raises:
        StorageUnavailable: The URI cannot be reached, or holds no corpus.
    """
    with _reaching(location):
        entries = _store(str(location)).manifest("corpus") or {}
        documents = {
            entry.object: name for name, entry in entries.items() if name.endswith(".parquet") and name.count("/") == 1
        }
        attempts = {attempt_of(found) for found in documents}
        if len(attempts) != 1 or any(f"{attempt_of(found)}/{name}" != found for found, name in documents.items()):
            raise StorageError(f"{location} holds no corpus in one place; start the run again to make it")
        return str(joined(location, attempts.pop(), "*", "*.parquet"))


def copy_model_files(location: Location, folder: Path) -> Path:
    """Copy the files of a finished run's model at a URI, without its weights, and return their directory.

    Args:
        location: URI of the run.
        folder: Folder in which the directory is created.

    Raises:
        NotFound: A file is too large to be read whole.
        StorageUnavailable: The URI cannot be reached.
    """
    directory = folder / hashlib.sha256(str(location).encode()).hexdigest() / "model"
    directory.mkdir(parents=True, exist_ok=True)
    storage = storage_of(location)
    for file in storage.files("model"):
        target = directory.parent / file.path
        if not file.path.endswith(".safetensors") and target.parent == directory:
            target.write_bytes(read(storage, file.path) or b"")
    return directory


def delete_folder(home: Location) -> None:
    """Delete all objects of a run at a URI.

    Args:
        home: URI of the run's own folder.

    Raises:
        StorageUnavailable: The URI cannot be reached.
    """
    with _reaching(home):
        RunStore.of(home, _PAUSES).remote.delete_folder("")


@functools.lru_cache(maxsize=_MOST_STORES)
def _store(location: str) -> RunStore:
    return RunStore.of(location, _PAUSES)


def _is_object(name: str) -> bool:
    return name.startswith(f"{OBJECTS}/") and not {"", ".", ".."} & set(name.split("/"))


def _own_entries(content: bytes | None) -> Entries:
    """Files that a manifest lists in the run's own objects; a driver could have forged other entries."""
    try:
        entries = entries_of(content or b"{}")
    except (ValueError, TypeError, AttributeError):
        return {}
    return {
        name: entry for name, entry in entries.items() if isinstance(entry.object, str) and _is_object(entry.object)
    }


@contextlib.contextmanager
def _reaching(location: Location) -> Iterator[None]:
    """Turn errors about a URI into `StorageUnavailable`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (StorageError, ConfigError) as error:
        raise StorageUnavailable(first_line(error)) from error
    except OSError as error:
        raise StorageUnavailable(f"{location} does not answer ({first_line(error)})") from error
