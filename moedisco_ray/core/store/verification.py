"""Verify the files of a committed directory against the checksums in its manifest.

While a stage runs, each machine verifies a file once, however many processes and attempts of the stage read it: the
first process records it in the machine's cache folder. A file that was written again since then is verified again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

from moedisco_ray.core.errors import REPAIR, DamagedError
from moedisco_ray.core.store.artifacts import Manifest, read_manifest
from moedisco_ray.core.store.checksums import Entry, in_threads, is_intact
from moedisco_ray.core.store.locations import cache_directory
from moedisco_ray.core.store.manifests import MANIFEST

_KEPT_SECONDS = 7 * 86_400.0
"""Time for which a machine keeps the records of an attempt (s): longer than most stages take."""


class Verifier:
    """Verifies files, each of them once.

    Args:
        attempt: Id of an attempt to make a stage: what other processes of this machine verified in the same attempt
            counts, too. Empty: only what this object verified counts.
        trusts: Whether to trust the disk, and verify nothing.
    """

    def __init__(self, attempt: str = "", *, trusts: bool = False) -> None:
        self.attempt = attempt
        self.trusts = trusts
        self._intact: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return _verifier, (self.attempt, self.trusts)  # what this machine has read says nothing about another one

    def verify(
        self,
        directory: Path,
        wanted: Callable[[str], bool] = lambda _: True,
        location: str = "",
        remedy: str = REPAIR,
        name: str = "",
    ) -> None:
        """Verify the files of a committed directory; do nothing without a manifest, or if the disk is trusted.

        Args:
            directory: The directory.
            wanted: Whether to verify the file of this name.
            location: Directory or URI of the run, for the error; by default, the directory's parent.
            remedy: What users should do, for the error.
            name: The directory's name in the location, for the error; by default, its own name.

        Raises:
            DamagedError: A file, or the manifest, is damaged or missing.
        """
        manifest = None if self.trusts else read_manifest(directory, remedy, name, location)
        for is_last in (False, True):
            if manifest is None:
                return
            damaged = self.damaged(directory, {each: entry for each, entry in manifest.files.items() if wanted(each)})
            if not damaged:
                return
            # a stage may have replaced the directory meanwhile
            newer = read_manifest(directory, remedy, name, location)
            if is_last or newer == manifest:
                raise DamagedError(
                    f"{name or directory.name}/{damaged[0]}", manifest.stage, location or str(directory.parent), remedy
                )
            manifest = newer

    def damaged(self, directory: Path, entries: Mapping[str, Entry]) -> list[str]:
        """Sorted names of the files that are missing from a directory or do not have the content of their entry."""

        def right(item: tuple[str, Entry]) -> bool:
            name, entry = item
            inside = ".." not in PurePosixPath(name).parts and not PurePosixPath(name).is_absolute()
            return inside and self.is_intact(directory / name, entry)

        return sorted(
            name for name, is_right in zip(entries, in_threads(right, entries.items()), strict=True) if not is_right
        )

    def is_intact(self, path: Path, entry: Entry) -> bool:
        """Whether a file exists and has the content of its entry."""
        try:
            found = path.stat()
        except OSError:
            return False
        identity = f"{path.absolute()} {found.st_dev} {found.st_ino} {found.st_mtime_ns} {found.st_size} {entry.sha256}"
        key = hashlib.sha256(identity.encode()).hexdigest()
        if key in self._intact:
            return True
        with self._recorded(key) as record:
            if record is None or not record.read():
                if not is_intact(path, entry):
                    return False
                if record is not None:
                    with contextlib.suppress(OSError):  # the disk of the cache folder is full
                        record.write(b"intact")
        self._intact.add(key)
        return True

    @contextlib.contextmanager
    def _recorded(self, key: str) -> Iterator[IO[bytes] | None]:
        """Lock and open the machine's record of a file, empty until the file is verified; None without records."""
        if not self.attempt:
            yield None
            return
        folder = cache_directory() / "verified" / self.attempt
        try:
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                _forget_old(folder.parent)
            opened = (folder / key).open("a+b", buffering=0)
        except OSError:  # without a cache folder, every process verifies for itself
            yield None
            return
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:  # some network file systems have no locks
                has_lock = False
            else:
                has_lock = True
                file.seek(0)
            yield file if has_lock else None


def damage_in(directory: Path) -> list[str]:
    """Names of the damaged files of a committed directory, manifest included; empty if none is damaged or committed."""
    try:
        manifest: Manifest | None = read_manifest(directory)
    except DamagedError:
        return [MANIFEST]
    return [] if manifest is None else Verifier().damaged(directory, manifest.files)


def _verifier(attempt: str, trusts: bool) -> Verifier:
    return Verifier(attempt, trusts=trusts)


def _forget_old(records: Path) -> None:
    """Delete the records of attempts that are long over."""
    for folder in records.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
