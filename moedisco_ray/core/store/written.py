"""Write single files of a run from streams of bytes, and read parts of them where they are stored."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from moedisco_ray.core.store.artifacts import reporting_full_disk
from moedisco_ray.core.store.checksums import Entry, sync
from moedisco_ray.core.store.run_store import RunStore

_PIECE = 4 << 20
"""Size of the pieces in which a file is read to be verified (bytes)."""


@contextlib.contextmanager
def writing(store: RunStore, path: Path) -> Iterator[IO[bytes]]:
    """Open a file of a run for writing; it appears, complete, when the block ends.

    For a run at a URI, this machine keeps no copy of it.

    Args:
        store: The run.
        path: The file, which no committed directory contains.

    Yields:
        The file.

    Raises:
        RunDirError: The disk is full.
        StorageError: The URI does not respond.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # others may write the same file
    try:
        with reporting_full_disk(path):
            with draft.open("wb") as file:
                yield file
            if store.is_remote:
                store.remote.upload(draft, str(store.name_of(path)))
            else:
                sync(draft)
                draft.replace(path)
                sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def read_part(store: RunStore, path: Path, offset: int, target: memoryview) -> int:
    """Fill a buffer with the bytes of a file of a run from an offset on; return how many the file has there.

    Raises:
        FileNotFoundError: The run's directory has no such file.
        StorageError: The URI does not respond, or has no such file.
    """

    def fill(file: Any) -> int:
        file.seek(offset)
        filled = 0
        while filled < len(target) and (count := file.readinto(target[filled:])):
            filled += count
        return filled

    return store.read_in_place(path, _opening(fill))


def entries_in(store: RunStore, path: Path, sizes: Sequence[int]) -> list[Entry]:
    """Size and SHA-256 of consecutive parts of a file of a run; a missing file has empty parts.

    Args:
        store: The run.
        path: The file.
        sizes: Size of each part (bytes).
    """

    def read(file: Any) -> list[Entry]:
        return [_entry(file, size) for size in sizes]

    return store.read_in_place(path, _opening(read)) if store.has(path) else [Entry(0, "") for _ in sizes]


def _entry(file: Any, size: int) -> Entry:
    digest, left = hashlib.sha256(), size
    while left and (piece := file.read(min(_PIECE, left))):
        digest.update(piece)
        left -= len(piece)
    return Entry(size - left, digest.hexdigest())


def _opening(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of a path or an open file, from one of an open file."""

    def of(source: Any) -> Any:
        if not isinstance(source, Path):
            return read(source)
        with source.open("rb", buffering=0) as file:
            return read(file)

    return of
