"""Checksums of files and JSON documents: they show that a disk, a memory or a copy changed what was written.

SHA-256 is in the standard library, and processors compute it at 1 GB/s or more per thread. Checksums do not protect
against people: anyone who may write a file may write its checksum too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

CHECKSUM = "checksum"
"""Key of a JSON document's own checksum."""

_NOTES = ".entries.json"
"""File in a folder of a draft with the entries of files that were linked into it."""
_THREADS = 8
"""Maximum number of files that one call reads in parallel; `hashlib` releases the interpreter's lock."""

T = TypeVar("T")
R = TypeVar("R")


class Entry(NamedTuple):
    """A file of a committed directory: size (bytes), SHA-256 and, for a run at a URI, the object that stores it."""

    size: int
    sha256: str
    object: str = ""

    @property
    def content(self) -> Entry:
        """Size and SHA-256 alone."""
        return Entry(self.size, self.sha256)


Entries = dict[str, Entry]
"""Entry of each file of a directory, by the file's name."""


def entry_of(path: Path) -> Entry:
    """Size and SHA-256 of a file."""
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
        return Entry(file.tell(), digest.hexdigest())


def is_intact(path: Path, entry: Entry) -> bool:
    """Whether a file exists and has the content of its entry."""
    try:
        # A stranger's link to a device would be read for ever.
        return path.is_file() and path.stat().st_size == entry.size and entry_of(path).content == entry.content
    except OSError:  # a file that the disk cannot read is damaged too
        return False


def note_entries(directory: Path, entries: Mapping[str, Entry]) -> None:
    """Note entries of a draft's files that were computed when the files were first written; see `stored_entries`."""
    (directory / _NOTES).write_text(json.dumps(entries), encoding="utf-8")


def stored_entries(directory: Path) -> Entries:
    """Entries of all files below a draft, after the operating system has written the files to the disk.

    Files whose entries are noted in their folder or one above it are not read: their checksums are as old as the files.
    The notes are deleted.
    """
    known: Entries = {}
    for notes in sorted(directory.rglob(_NOTES)):
        folder = notes.parent.relative_to(directory)
        known |= {(folder / name).as_posix(): Entry(*entry) for name, entry in json.loads(notes.read_bytes()).items()}
        notes.unlink()
    paths = sorted(path for path in directory.rglob("*") if path.is_file())

    def stored(path: Path) -> tuple[str, Entry]:
        name = path.relative_to(directory).as_posix()
        sync(path)
        return name, known[name].content if name in known else entry_of(path)

    entries = dict(in_threads(stored, paths))
    for folder in sorted({path.parent for path in paths} | {directory}):
        sync(folder)
    return entries


def sync(path: Path) -> None:
    """Return when the operating system has written a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL) or not path.is_dir():  # some file systems sync files alone
            raise
    finally:
        os.close(handle)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Results of a function that reads files, for each item, in order."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="checksums") as threads:
        return list(threads.map(function, items))


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of its other values, which do not depend on white space or the order of keys."""
    # As a reader will find them: keys as text, tuples as lists.
    found = {name: value for name, value in json.loads(json.dumps(values)).items() if name != CHECKSUM}
    return {**found, CHECKSUM: _digest(found)}


def without_checksum(content: bytes) -> dict[str, Any]:
    """The JSON object in a file's content, without its checksum.

    Raises:
        ValueError: The content is no JSON object, or its checksum is missing or wrong.
    """
    values = json.loads(content)
    if not isinstance(values, dict) or CHECKSUM not in values:
        raise ValueError("no JSON object with a checksum")
    return checked(values)


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a JSON object without its checksum, which is verified if there is one.

    Raises:
        ValueError: The checksum is wrong.
    """
    found = {name: value for name, value in values.items() if name != CHECKSUM}
    if CHECKSUM in values and values[CHECKSUM] != _digest(found):
        raise ValueError("wrong checksum")
    return found


def digest_of(entries: Mapping[str, Entry]) -> str:
    """One checksum of the names and contents of several files."""
    return _digest({name: entry.content for name, entry in entries.items()})


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
