"""Files of data sets on the disk: uploads that have not ended, contents by their hash, and folders that runs read.

STORE/                    `.datasets` in the first folder of homes
├── uploads/OWNER/SHA256  what has arrived of a file; OWNER is a hash of the owner's name
├── contents/SHA256       a complete file, stored once for all data sets and owners
├── files/HASH/PATH       the files of the data sets with this hash, as hard links to contents
└── copies/HASH           the URI of a copy of these files, which runs read if the first output root is a URI

A file is written in its owner's folder and moved to `contents` when its hash was checked. From then on no open
descriptor can change it: every writer holds the file's lock while it writes, and checks that it is still an upload.
All files have the same time, so that a run's fingerprint depends on the content alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moedisco_ray.core.errors import ConfigError, StorageError
from moedisco_ray.core.store.locations import first_line, joined
from moedisco_ray.core.store.run_store import RunStore
from service.database import datasets
from service.database.session import Database
from service.domain.datasets import DatasetFile, marker_in, store_in
from service.driver_user import DriverUser
from service.errors import Conflict, InvalidRequest, StorageFull, StorageUnavailable

_PAUSES = ()
"""Pauses between attempts to reach a URI: there are none, because a client repeats the request."""
_TIME = 0
"""Time of all files, in seconds since the epoch."""
_AT_ONCE = 100
"""Number of contents that are deleted in one transaction."""
_CHECKED = ".checked"
_DRAFT = ".draft-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DatasetStore:
    """The files of all data sets of a service.

    Every method raises `StorageFull` if the disk is full, and `StorageUnavailable` if it refuses access.

    Args:
        home: Folder in which the service creates the homes of runs.
        user: User of the drivers, who may read the folders of data sets; None if drivers run as the service's user.
        bucket: URI below which new data sets are copied for runs; None if runs read the folders.
    """

    def __init__(self, home: Path, user: DriverUser | None = None, bucket: str | None = None) -> None:
        self._home = home
        self._root = store_in(home)
        self._bucket = bucket
        self._user = user
        self._contents, self._files, self._uploads = (self._root / name for name in ("contents", "files", "uploads"))

    def has(self, sha256: str) -> bool:
        """Whether a content is stored."""
        return (self._contents / sha256).is_file()

    def folder(self, digest: str) -> Path:
        """Folder of the files of the data sets with a hash."""
        return self._files / digest

    def arrived(self, owner: str, sha256: str) -> int:
        """Number of bytes of an owner's upload that have arrived."""
        upload = self._upload(owner, sha256)
        with contextlib.suppress(FileNotFoundError):
            return upload.stat().st_size
        with contextlib.suppress(FileNotFoundError):
            return upload.with_suffix(_CHECKED).stat().st_size
        return 0

    def unfinished_bytes(self, owner: str) -> int:
        """Size of an owner's uploads that have not ended (bytes)."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self._uploads / _folder_of(owner)) as entries:
            return sum(entry.stat().st_size for entry in entries)
        return 0

    def append(self, owner: str, sha256: str, offset: int, block: bytes) -> None:
        """Write a block of an upload; bytes that have arrived before are written again.

        Raises:
            Conflict: The block would leave a gap, or another request has completed the upload.
        """
        upload = self._upload(owner, sha256)
        with _disk_errors():
            upload.parent.mkdir(parents=True, exist_ok=True)
            with _locked(upload, os.O_WRONLY | os.O_CREAT) as number:
                size = os.fstat(number).st_size
                if offset > size:
                    raise Conflict(f"{size} bytes of this file have arrived; continue there")
                written = memoryview(block)
                while written:
                    count = os.pwrite(number, written, offset)
                    written, offset = written[count:], offset + count

    def check(self, owner: str, sha256: str, size: int) -> None:
        """Check the hash of an upload that has arrived; from then on nothing can change it.

        Raises:
            Conflict: Bytes are missing.
            InvalidRequest: The content has another size or hash; it is removed.
        """
        upload = self._upload(owner, sha256)
        checked = upload.with_suffix(_CHECKED)
        with _disk_errors():
            if checked.is_file() and not upload.exists():
                return
            if not size:
                self.append(owner, sha256, 0, b"")
            with _locked(upload, os.O_RDWR) as number:
                arrived = os.fstat(number).st_size
                if arrived < size:
                    raise Conflict(f"{arrived} of {size} bytes have arrived; continue there")
                with open(number, "rb", closefd=False) as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if arrived != size or found != sha256:
                    upload.unlink()
                    raise InvalidRequest(
                        [("sha256", f"what has arrived is another content ({arrived} bytes, {found}); upload it again")]
                    )
                os.fsync(number)
                upload.replace(checked)

    def publish(self, owner: str, sha256: str) -> None:
        """Move a checked upload to the contents. The caller holds the database's lock of this content."""
        checked, target = self._upload(owner, sha256).with_suffix(_CHECKED), self._contents / sha256
        with _disk_errors():
            self._contents.mkdir(parents=True, exist_ok=True)
            if target.is_file():
                checked.unlink(missing_ok=True)
                return
            checked.chmod(0o444)
            os.utime(checked, (_TIME, _TIME))
            checked.replace(target)
            _sync(self._contents)

    def assemble(self, digest: str, files: Sequence[DatasetFile]) -> None:
        """Create the folder of a data set from stored contents, and its copy at a URI."""
        if not self.folder(digest).is_dir():
            self._fill(digest, files)
        if self._bucket is not None and not marker_in(self._home, digest).exists():
            self._copy(str(joined(self._bucket, ".datasets", "files", digest)), digest, files)

    def _fill(self, digest: str, files: Sequence[DatasetFile]) -> None:
        draft = self._files / f"{_DRAFT}{uuid.uuid4().hex}"
        with _disk_errors():
            try:
                self._make(draft)
                for file in files:
                    target = draft / file.path
                    self._make(target.parent)
                    self._link(self._contents / file.sha256, target)
                draft.replace(self.folder(digest))
            except OSError:
                shutil.rmtree(draft, ignore_errors=True)
                if not self.folder(digest).is_dir():  # otherwise an equal request was faster
                    raise
            _sync(self._files)

    def _copy(self, uri: str, digest: str, files: Sequence[DatasetFile]) -> None:
        """Copy a folder to a URI; a request that is repeated continues after the files that are there."""
        marker = marker_in(self._home, digest)
        draft = marker.with_name(f"{_DRAFT}{uuid.uuid4().hex}")
        with _disk_errors():
            remote = RunStore.of(uri, _PAUSES).remote
            present = remote.list()
            for file in files:
                if present.get(file.path) != file.bytes:
                    remote.upload(self.folder(digest) / file.path, file.path)
            self._make(marker.parent)
            draft.write_text(uri, encoding="utf-8")
            draft.replace(marker)

    def remove_folder(self, digest: str) -> None:
        """Delete the folder of a data set, and its copy. The caller holds the database's lock of this hash."""
        aside, marker = self._files / f"{_DRAFT}{uuid.uuid4().hex}", marker_in(self._home, digest)
        with _disk_errors():
            if marker.is_file():
                RunStore.of(marker.read_text(encoding="utf-8"), _PAUSES).remote.delete_folder("")
                marker.unlink()
            with contextlib.suppress(FileNotFoundError):
                self.folder(digest).replace(aside)
            shutil.rmtree(aside, ignore_errors=True)

    def remove_content(self, sha256: str) -> None:
        """Delete a content. The caller holds the database's lock of this content."""
        with _disk_errors():
            (self._contents / sha256).unlink(missing_ok=True)

    def remove_old(self, before: float) -> None:
        """Delete uploads and drafts that have not changed since a time."""
        with _disk_errors():
            for path in (*self._uploads.glob("*/*"), *self._files.glob(f"{_DRAFT}*")):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime < before:
                        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def stored(self, before: float) -> tuple[list[str], list[str]]:
        """Hashes of the contents, and of the folders of data sets, that were stored before a time."""
        with _disk_errors():
            return _names(self._contents, before), _names(self._files, before)

    def _upload(self, owner: str, sha256: str) -> Path:
        return self._uploads / _folder_of(owner) / sha256

    def _make(self, folder: Path) -> None:
        """Create a folder and those above it in the store."""
        if folder.is_dir():
            return
        if folder != self._root:
            self._make(folder.parent)
        folder.mkdir(parents=folder == self._root, exist_ok=True)
        self._let_read(folder)

    def _link(self, content: Path, target: Path) -> None:
        try:
            target.hardlink_to(content)
        except OSError as error:
            if error.errno not in (errno.EMLINK, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV):
                raise
            shutil.copyfile(content, target)  # a disk without hard links, or a content with too many
            os.utime(target, (_TIME, _TIME))
        self._let_read(target)

    def _let_read(self, path: Path) -> None:
        if self._user is None:
            return
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._user.let_read(number)
        finally:
            os.close(number)


def remove_unused(database: Database, store: DatasetStore, folders: Iterable[str], contents: Sequence[str]) -> None:
    """Delete the folders of data sets with some hashes, and contents, unless a data set or an owner has them again."""
    for digest in folders:
        with database.write() as session:
            datasets.lock(session, digest)
            if not datasets.exists_with(session, digest):
                store.remove_folder(digest)
    for start in range(0, len(contents), _AT_ONCE):
        with database.write() as session:
            for sha256 in sorted(contents[start : start + _AT_ONCE]):
                datasets.lock_blob(session, sha256)
                if not datasets.is_used(session, sha256):
                    store.remove_content(sha256)


def _folder_of(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()[:32]


def _names(folder: Path, before: float) -> list[str]:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        # The time of a file's content is not that of its storage.
        return [entry.name for entry in entries if len(entry.name) == 64 and entry.stat().st_ctime < before]
    return []


@contextlib.contextmanager
def _locked(upload: Path, flags: int) -> Iterator[int]:
    """Open an upload that no other request is writing or checking.

    Raises:
        Conflict: Another request holds the lock, or has completed the upload.
    """
    try:
        number = os.open(upload, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as error:
        raise Conflict("nothing of this file has arrived; upload it from the start") from error
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (upload.exists() and os.path.samestat(os.fstat(number), upload.stat())):
            raise _completing()
        yield number
    except BlockingIOError as error:
        raise _completing() from error
    finally:
        os.close(number)


def _completing() -> Conflict:
    return Conflict("another request writes or completes this upload; ask again which files are missing")


def _sync(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except (StorageFull, StorageUnavailable):
        raise
    except (StorageError, ConfigError) as error:
        raise StorageUnavailable(first_line(error)) from error
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull(
                "the service has no room for more; what has arrived is kept: delete data sets or runs, or ask the "
                "operator, and upload again"
            ) from error
        raise StorageUnavailable(f"the data sets cannot be read or written ({error.strerror})") from error
