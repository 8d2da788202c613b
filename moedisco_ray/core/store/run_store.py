"""Where a run is stored: in a directory, or at a URI with a working copy on every machine.

At a URI, most files have the same names as in the run directory. The files of a committed directory (an artifact, or
the output of a training) are stored as objects with other names. The directory's manifest, which is written last, lists
these objects.

    LOCATION/config.json, events.jsonl, ...      loose files, replaced as a whole
    LOCATION/corpus/manifest.json                {"files": {NAME: [SIZE, SHA256, OBJECT]}}; commits the directory
    LOCATION/objects/corpus-4f1c.../train/...    objects of one attempt to write a directory; never changed
    LOCATION/receipts/corpus-4f1c.../*.json      objects that one worker has uploaded for an uncommitted directory

So a half-written directory is never visible, and writing one object (the manifest) replaces a directory. Objects are
never renamed. They are deleted once no manifest lists them. A working copy holds only the files that were written or
read on its machine. For a run in a directory, nothing is transferred.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moedisco_ray.core.store.artifacts import OnDisk, amend_manifest, link_directory, write_text
from moedisco_ray.core.store.cache import locked, make_room, note_uploaded, pinned, record, recorded
from moedisco_ray.core.store.checksums import Entries, Entry
from moedisco_ray.core.store.locations import Location, is_uri, joined, working_directory
from moedisco_ray.core.store.manifests import (
    MANIFEST,
    OBJECTS,
    attempt_of,
    cached_unit,
    check_entries,
    committed_entries,
    download,
    entries_of,
    files_in,
    has_size,
    owner_of,
    upload,
    write_receipt,
)
from moedisco_ray.core.store.remote_commits import RemoteCommits
from moedisco_ray.core.store.run_pickler import RunPickler
from moedisco_ray.core.store.verification import Verifier

if TYPE_CHECKING:
    from moedisco_ray.core.store.remote import Remote

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RunStore:
    """The files of one run. A store that is pickled to another machine uses that machine's working copy.

    Attributes:
        location: Path or URI of the run.
        directory: The run directory: the location itself, or this machine's working copy.
        pauses: Pauses between attempts to reach the URI, in seconds; by default, `remote.RETRY_PAUSES`.
        verifies: Whether files are verified before they are used.
        attempt: Id of the attempt to make a stage in which the files are used; see `verification.Verifier`.
    """

    location: Location
    directory: Path
    pauses: tuple[float, ...] | None = None
    verifies: bool = dataclasses.field(default=True, compare=False)
    attempt: str = dataclasses.field(default="", compare=False)

    @classmethod
    def of(
        cls, location: Location, pauses: tuple[float, ...] | None = None, *, verifies: bool = True, attempt: str = ""
    ) -> RunStore:
        """The store of the run at a location, for use on this machine."""
        return cls(location, working_directory(location), pauses, verifies, attempt)

    def __reduce__(self) -> tuple[Any, ...]:
        return _store_at, (self.location if self.is_remote else joined(self.location), self.verifies, self.attempt)

    @property
    def is_remote(self) -> bool:
        """Whether the run is at a URI."""
        return is_uri(self.location)

    @functools.cached_property
    def remote(self) -> Remote:
        """The run's folder at its URI."""
        from moedisco_ray.core.store.remote import Remote  # noqa: PLC0415  # pyarrow takes a while to import

        return Remote(self.location, "output", self.pauses)

    @property
    def _commits(self) -> RemoteCommits:
        return RemoteCommits(self.remote, self.directory)

    @functools.cached_property
    def _verifier(self) -> Verifier:
        return Verifier(self.attempt)

    @property
    def home(self) -> Path:
        """Folder on this machine that contains the working copy, and records and locks for it."""
        return self.directory.parent

    def fetch(self, *paths: Path) -> None:
        """Verify files or directories of the run, and download what the working copy of a run at a URI lacks.

        Files of a committed directory are verified against its manifest; paths outside of the run are ignored. Several
        processes of a machine may call this at once.

        Raises:
            DamagedError: A file of a run in a directory is damaged.
            StorageError: The URI does not respond, or an object is damaged.
        """
        with self.using(*paths):
            pass

    @contextlib.contextmanager
    def using(self, *paths: Path) -> Iterator[None]:
        """Like `fetch`, but also prevent the deletion of the files from the working copy until the block ends.

        Raises:
            DamagedError: A file of a run in a directory is damaged.
            StorageError: The URI does not respond, or an object is damaged.
        """
        names = [name for name in map(self.name_of, paths) if name is not None]
        if not self.is_remote:
            for name in names if self.verifies else ():
                self._verify(name)
            yield
            return
        with pinned(self.home, map(cached_unit, names)):
            missing = False
            for name in names:
                with locked(self.home, owner_of(name) or name):
                    missing |= self._fetch(name)
            if missing:
                make_room(self.home.parent)
            yield

    def publish(self, *paths: Path) -> None:
        """Upload files or directories that this process has finished writing.

        A directory that is not part of a draft is committed.

        Raises:
            StorageError: The URI does not respond.
        """
        if not self.is_remote:
            return
        drafts: dict[str, list[Path]] = {}
        for path in paths:
            name = self.name_of(path)
            if name is None:
                continue
            if name.startswith(f"{OBJECTS}/"):
                drafts.setdefault(attempt_of(name), []).extend(files_in(path))
            elif path.is_dir():
                self._commits.commit(name, path)
            else:
                self.remote.upload(path, name)
        for draft, files in drafts.items():
            entries = upload(self.remote, files, self.directory / draft, draft)
            write_receipt(self.remote, draft, entries)
            note_uploaded(self.home, draft, (entry.object for entry in entries.values()))

    def files(self, directory: Path, suffix: str = "") -> list[Path]:
        """Sorted paths of a directory's files whose names end in `suffix`, including those not in the working copy."""
        found = {path for path in directory.glob(f"*{suffix}") if path.is_file() and path.name != MANIFEST}
        name = self.name_of(directory) if self.is_remote else None
        owner = None if name is None else owner_of(name)
        if name is not None and owner is not None:
            entries = self.manifest(owner) or {}
            below = f"{name}/"[len(owner) + 1 :]
            found |= {
                self.directory / owner / each
                for each in entries
                if each.startswith(below) and "/" not in each[len(below) :] and each.endswith(suffix)
            }
        return sorted(found)

    def has(self, path: Path) -> bool:
        """Whether a file, a committed directory, or a directory inside a committed one exists."""
        name = self.name_of(path) if self.is_remote else None
        if name is None:
            return path.exists()
        owner = owner_of(name)
        if owner is None:
            return self.remote.modified(name) is not None
        entries = self.manifest(owner)
        if entries is None:
            return self.remote.modified(name) is not None
        return owner == name or any(f"{owner}/{each}".startswith((f"{name}/", name)) for each in entries)

    def read(self, name: str) -> bytes | None:
        """Content of a file, by its name relative to the run directory, read without a working copy; None if absent."""
        if not self.is_remote:
            with contextlib.suppress(OSError):
                self.fetch(self.directory / name)
                return (self.directory / name).read_bytes()
            return None
        found = self.object_of(name)
        return None if found is None else self.remote.read(found)

    def read_in_place(self, path: Path, read: Callable[[Any], T]) -> T:
        """Result of a function of a file of the run, without fetching the file.

        Args:
            path: The file.
            read: Reads the parts that it needs. It receives the path if the file is present in the working copy, or
                else a pyarrow file that reads at any position; it may be called again after an error.

        Raises:
            StorageError: The URI does not respond.
        """
        name = self.name_of(path) if self.is_remote and not path.exists() else None
        found = None if name is None else self.object_of(name)
        if found is None:
            return read(path)
        return self.remote.read_in_place(found, read)

    def object_of(self, name: str) -> str | None:
        """Name of the object that stores a file; None if the file's committed directory does not exist or lacks it."""
        owner = owner_of(name)
        if owner is None or name in (owner, f"{owner}/{MANIFEST}"):  # a file in `checkpoints` is its own owner
            return name
        entry = (self.manifest(owner) or {}).get(name[len(owner) + 1 :])
        return None if entry is None else entry.object

    def read_newest(self, name: str) -> bytes | None:
        """Like `read`, for the driver: files outside of committed directories come from its newer working copy."""
        path = self.directory / name
        return path.read_bytes() if owner_of(name) is None and path.exists() else self.read(name)

    def remove(self, directory: Path, *, objects: bool = False) -> None:
        """Delete a directory that is not an artifact, on this machine and at the URI.

        Args:
            directory: The directory.
            objects: Whether to delete the objects of a committed directory, too. No other manifest may list them.
        """
        name = self.name_of(directory) if self.is_remote else None
        if name is not None:
            entries = (self.manifest(name) or {}) if objects else {}
            self.remote.delete(f"{name}/{MANIFEST}")
            self.remote.delete_folder(name)
            for attempt in {attempt_of(entry.object) for entry in entries.values()}:
                self.remote.delete_folder(attempt)
        shutil.rmtree(directory, ignore_errors=True)

    def delete(self, name: str) -> None:
        """Delete a file that is stored under its own name, on this machine and at the URI."""
        (self.directory / name).unlink(missing_ok=True)
        if self.is_remote:
            self.remote.delete(name)

    def amend(self, path: Path) -> None:
        """Replace one file of a committed artifact with the changed file in the working copy."""
        name = str(self.name_of(path))
        if self.is_remote:
            self._commits.amend(name)
        else:
            amend_manifest(self.directory / name.partition("/")[0], path)

    def dumps(self, value: Any, *others: RunStore) -> bytes:
        """Pickle a value for another machine; paths in this store and `others` become paths in its copies."""
        file = io.BytesIO()
        RunPickler(file, self, *others).dump(value)
        return file.getvalue()

    def link(self, source: Path, target: Path) -> None:
        """Copy a finished directory into a draft without its data: by hard links, at a URI by references to objects."""
        if self.is_remote:
            self._commits.link(str(self.name_of(source)), str(self.name_of(target)))
        if source.is_dir():
            link_directory(source, target, notes=not self.is_remote)  # at a URI, the receipt has the entries

    def name_of(self, path: Path) -> str | None:
        """Name of a path relative to the run directory; None for a path outside of the run."""
        path, directory = path.absolute(), self.directory.absolute()
        return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else None

    def draft(self, directory: Path) -> Path:
        """Path of the draft in which to write a new version of a directory; see `artifacts.commit`."""
        if not self.is_remote:
            return OnDisk().draft(directory)
        return self.directory / OBJECTS / f"{directory.name}-{uuid.uuid4().hex[:12]}"

    def replace(
        self, draft: Path, directory: Path, manifest: Mapping[str, Any], check: Callable[[], None] = lambda: None
    ) -> None:
        """Replace a directory with its complete draft; see `artifacts.commit`.

        Args:
            draft: The draft.
            directory: The directory.
            manifest: Content of its manifest, without the objects.
            check: Called right before the manifest is written to a URI; the directory stays as it is if it raises an
                error.
        """
        if self.is_remote:
            self._commits.replace(str(self.name_of(draft)), str(self.name_of(directory)), manifest, check)
        else:
            OnDisk().replace(draft, directory, manifest)

    def _fetch(self, name: str) -> bool:
        """Fetch a file, or all files below a directory; return whether any was missing."""
        owner = owner_of(name)
        content = None if owner is None else self.remote.read(f"{owner}/{MANIFEST}")
        if owner is None or content is None:
            return self._fetch_loose(name)
        self.renew(owner, content)
        below = f"{name}/"[len(owner) + 1 :]
        wanted = {
            self.directory / owner / each: entry
            for each, entry in entries_of(content).items()
            if not below or each.startswith(below) or f"{each}/" == below
        }
        check_entries(self.directory / owner, wanted)
        missing = {path: entry for path, entry in wanted.items() if not self._is_present(path, entry)}
        download(self.remote, missing)
        return bool(missing)

    def _is_present(self, path: Path, entry: Entry) -> bool:
        return self._verifier.is_intact(path, entry) if self.verifies else has_size(path, entry.size)

    def _verify(self, name: str) -> None:
        """Verify a file, or all files below a directory; the files of a draft have no checksums yet."""
        owner = owner_of(name)
        if owner is not None:
            below = f"{name}/"[len(owner) + 1 :]
            self._verifier.verify(
                self.directory / owner,
                lambda each: not below or f"{each}/".startswith(below),
                str(self.location),
                name=owner,
            )

    def _fetch_loose(self, name: str) -> bool:
        draft = name.startswith(f"{OBJECTS}/")  # once uploaded, files of a draft never change
        found = self.remote.list(name)
        missing = [each for each, size in found.items() if not (draft and has_size(self.directory / each, size))]
        for each in missing:
            self.remote.download(each, self.directory / each)
        if draft and missing:
            note_uploaded(self.home, attempt_of(name), missing)
        return bool(missing)

    def renew(self, owner: str, content: bytes) -> None:
        """Delete the local files of a committed directory if its manifest at the URI has changed."""
        if recorded(self.home, owner) == content:
            return
        directory = self.directory / owner
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        if "/" not in owner:
            write_text(directory / MANIFEST, content.decode())
        record(self.home, owner, content)

    def manifest(self, owner: str) -> Entries | None:
        """Entries of the files of a committed directory; None if the directory is not committed."""
        return committed_entries(self.remote, owner)


def _store_at(location: Location, verifies: bool, attempt: str) -> RunStore:
    return RunStore.of(location, verifies=verifies, attempt=attempt)


SHARED = RunStore.of(Path(), verifies=False)
"""A store for files that all machines share: it transfers and verifies nothing."""
